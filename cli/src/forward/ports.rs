//! A set of port numbers, of fixed size whatever a guest reports.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use agent::protocol::Listener;

/// Ports of the guest at which a program answers on its loopback.
#[derive(Clone, PartialEq, Eq)]
pub struct PortSet(Box<[u64; 1024]>);

impl PortSet {
    /// No port.
    pub fn new() -> Self {
        Self(Box::new([0; 1024]))
    }

    /// The ports that a connection to 127.0.0.1 or ::1 reaches.
    pub fn reachable(listeners: &[Listener]) -> Self {
        let mut set = Self::new();
        for listener in listeners {
            let reached = match listener.address.to_canonical() {
                IpAddr::V4(ip) => ip == Ipv4Addr::LOCALHOST || ip.is_unspecified(),
                IpAddr::V6(ip) => ip == Ipv6Addr::LOCALHOST || ip.is_unspecified(),
            };
            if reached && listener.port != 0 {
                set.insert(listener.port);
            }
        }
        set
    }

    /// Whether there is none in it.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Adds `port`.
    pub fn insert(&mut self, port: u16) {
        self.0[usize::from(port >> 6)] |= 1 << (port & 63);
    }

    /// Whether `port` is in it.
    pub fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port >> 6)] & (1 << (port & 63)) != 0
    }

    /// Takes out what is not in `other`.
    pub fn keep(&mut self, other: &Self) {
        for (word, other) in self.0.iter_mut().zip(other.0.iter()) {
            *word &= other;
        }
    }

    /// All of them, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        let words = (0..1024u16)
            .zip(self.0.iter())
            .filter(|(_, word)| **word != 0);
        words.flat_map(|(index, word)| {
            let bits = (0..64u16).filter(move |bit| word & (1 << bit) != 0);
            bits.map(move |bit| index << 6 | bit)
        })
    }
}

impl FromIterator<u16> for PortSet {
    fn from_iter<I: IntoIterator<Item = u16>>(ports: I) -> Self {
        let mut set = Self::new();
        for port in ports {
            set.insert(port);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_loopback_does_not_reach_is_left_out() {
        let at = |address: &str, port| Listener {
            port,
            address: address.parse().unwrap(),
            uid: 0,
        };
        let set = PortSet::reachable(&[
            at("127.0.0.1", 1),
            at("0.0.0.0", 63),
            at("::1", 64),
            at("::", 65535),
            at("::ffff:127.0.0.1", 8000),
            at("127.0.0.53", 53),
            at("10.0.0.1", 5432),
            at("fe80::1", 22),
            at("0.0.0.0", 0),
        ]);
        assert_eq!(set.iter().collect::<Vec<_>>(), [1, 63, 64, 8000, 65535]);
    }
}
