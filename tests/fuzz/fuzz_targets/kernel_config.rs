//! A kernel's embedded configuration, and a configuration's text.

#![no_main]

use kernels::config::{Config, embedded};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = embedded(data).unwrap_or_else(|| String::from_utf8_lossy(data).into_owned());
    let config = Config::parse(&text);
    let differences = config.differences(&config);
    assert!(
        differences.is_empty(),
        "it differs from itself: {differences:?}"
    );
});
