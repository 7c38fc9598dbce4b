//! Forwards as they are typed, stored and sent to a machine's control socket: what is taken means the same
//! when it was written back.
//!
//! The grammar belongs to a program, not to a library, and depends on nothing else of it: its file is a
//! module here too.

#![no_main]

#[path = "../../../cli/src/forward/spec/mod.rs"]
mod spec;

use libfuzzer_sys::fuzz_target;
use spec::{GuestEnd, HostEnd, HostTarget, Publish, Reverse, Rule, addresses};

fuzz_target!(|text: &str| {
    if let Ok(publish) = text.parse::<Publish>() {
        assert_eq!(publish.to_string().parse(), Ok(publish.clone()));
        for Rule { host, guest, .. } in publish.rules() {
            assert_ne!(guest, GuestEnd::Port(0));
            if let HostEnd::Port { address, port } = host {
                assert_ne!(port, Some(0));
                let loopback = addresses(address).iter().all(|ip| ip.is_loopback());
                assert_eq!(loopback, !publish.is_wide());
            }
        }
    }
    if let Ok(reverse) = text.parse::<Reverse>() {
        assert_eq!(reverse.to_string().parse(), Ok(reverse.clone()));
        if let HostTarget::Host { host, port } = reverse.target() {
            assert!(!host.is_empty() && *port != 0);
        }
    }
});
