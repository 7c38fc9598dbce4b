//! The verbs.

pub mod accel;
pub mod connect;
pub mod console;
pub mod cp;
pub mod doctor;
pub mod kernel;
pub mod run;
pub mod ssh_config;
