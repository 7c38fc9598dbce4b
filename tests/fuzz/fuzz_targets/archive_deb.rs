//! A Debian package.

#![no_main]

use std::io::{self, Read};

use kernels::archive::{Limits, Member};
use kernels::deb;
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    entries: 100,
};

fuzz_target!(|data: &[u8]| {
    let mut total = 0;
    let mut visit = |_: &Member, contents: &mut dyn Read| {
        total += io::copy(contents, &mut io::sink())?;
        Ok(())
    };
    // Whichever it is: an answer.
    let _ = deb::for_each_file(data, LIMITS, &mut visit);
    assert!(total <= LIMITS.bytes, "more came out than may");
});
