//! Credit, backpressure, fairness and the integrity of what is carried.

use super::*;
