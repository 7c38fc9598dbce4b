//! A guest that breaks the rules.

use super::*;
