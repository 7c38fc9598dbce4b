//! The verbs.

pub mod accel;
pub mod console;
pub mod doctor;
pub mod kernel;
pub mod run;
