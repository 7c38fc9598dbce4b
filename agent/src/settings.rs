//! Settings of the kernel that its command line cannot make.

use std::fs;

use agent::guest::Setting;

/// Applies `settings`; what the kernel does not take is told on the console, and is no reason to give up.
pub fn apply(settings: &[Setting]) {
    for Setting { path, value } in settings {
        if let Err(error) = fs::write(path, value) {
            eprintln!("mvm-agent: {path} cannot be set to {value}: {error}");
        }
    }
}
