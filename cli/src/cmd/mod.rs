//! The verbs.

pub mod accel;
mod connect;
pub mod console;
pub mod cp;
pub mod doctor;
mod exec;
mod inspect;
pub mod kernel;
mod lifecycle;
mod logs;
pub mod machine;
mod mount;
mod port;
mod ps;
pub mod run;
mod ssh_config;
mod stats;
