//! End to end: what a user types, and what comes of it.

mod run;
