//! What a client of the proxy names, as the guest is to understand it.

use std::net::{IpAddr, Ipv6Addr};

use agent::protocol::Target;

/// The longest name: that of SOCKS5's length byte, and of [`Target::Host`].
const MAX_HOST: usize = 255;

/// The target that `host` and `port` name; None where there can be none.
///
/// `localhost` and everything below it is the guest's loopback (RFC 6761, section 6.3). Addresses go on as they
/// are: who writes 127.0.0.1 means that one.
pub fn target(host: &str, port: u16) -> Option<Target> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let odd = |c: char| c.is_control() || c.is_whitespace();
    if port == 0 || host.is_empty() || host.len() > MAX_HOST || host.contains(odd) {
        return None;
    }
    Some(if is_localhost(host) {
        Target::Loopback(port)
    } else {
        Target::Host {
            host: host.to_owned(),
            port,
        }
    })
}

/// The target at an address.
pub fn address(ip: IpAddr, port: u16) -> Option<Target> {
    target(&ip.to_string(), port)
}

/// The target of a URI's authority, `host:port`, `[IPv6]:port`, or without a port where there is a
/// default; None for anything else, a user's name included.
pub fn authority(text: &str, default_port: Option<u16>) -> Option<Target> {
    let (host, rest) = match text.strip_prefix('[') {
        Some(text) => {
            let (host, rest) = text.split_once(']')?;
            host.parse::<Ipv6Addr>().ok()?;
            (host, rest)
        }
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    if host.contains(['@', '/', '?', '#', '\\']) {
        return None;
    }
    let port = match rest.strip_prefix(':') {
        // An empty port is the default one (RFC 3986, section 3.2.3).
        Some("") => default_port?,
        Some(digits) if is_port(digits) => digits.parse().ok()?,
        None if rest.is_empty() => default_port?,
        _ => return None,
    };
    target(host, port)
}

/// Whether these are digits, and few: the text goes into a Host header again.
fn is_port(digits: &str) -> bool {
    digits.len() <= 5 && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_localhost(host: &str) -> bool {
    let label = host.rsplit('.').next().unwrap_or(host);
    label.eq_ignore_ascii_case("localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(host: &str, port: u16) -> Option<Target> {
        Some(Target::Host {
            host: host.to_owned(),
            port,
        })
    }

    #[test]
    fn localhost_in_every_spelling_is_the_guests_loopback() {
        for name in ["localhost", "LocalHost", "localhost.", "app.localhost"] {
            assert_eq!(target(name, 80), Some(Target::Loopback(80)), "{name}");
        }
        for name in ["notlocalhost", "localhost.example", "127.0.0.1"] {
            assert_eq!(target(name, 80), host(name, 80));
        }
    }

    #[test]
    fn what_cannot_be_a_host_or_a_port_is_no_target() {
        for name in ["", ".", "a b", "a\0", "a\r\nb", &"a".repeat(256)] {
            assert_eq!(target(name, 80), None, "{name:?}");
        }
        assert_eq!(target("db", 0), None);
    }

    #[test]
    fn an_authority_is_a_host_and_a_port() {
        assert_eq!(authority("db:5432", None), host("db", 5432));
        assert_eq!(authority("[fd00::1]:80", None), host("fd00::1", 80));
        assert_eq!(authority("db", Some(80)), host("db", 80));
        assert_eq!(authority("[::1]", Some(80)), host("::1", 80));
        assert_eq!(authority("db:", Some(80)), host("db", 80));
        let refused = [
            "db",
            "db:",
            ":80",
            "db:0",
            "db:+80",
            "db:000080",
            "db:65536",
            "a@db:1",
            "::1:80",
            "[::1",
            "[::1]x:1",
            "[db]:80",
            "db:80:80",
            "",
        ];
        for text in refused {
            assert_eq!(authority(text, None), None, "{text}");
        }
    }
}
