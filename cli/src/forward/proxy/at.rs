//! Where the proxy listens, as it is typed: `[IP:]PORT`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::forward::spec::SpecError;

const FORM: &str = "[IP:]PORT";

/// `[IP:]PORT`; without an address the loopback ones of both families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct At {
    address: Option<IpAddr>,
    port: u16,
}

impl At {
    /// The address that was written.
    pub fn address(self) -> Option<IpAddr> {
        self.address
    }

    /// The port; not 0.
    pub fn port(self) -> u16 {
        self.port
    }

    /// What is to be said before others than this host's own programs can use it: it asks for no password.
    pub fn warning(self) -> Option<String> {
        let wide = self.address.is_some_and(|address| !address.is_loopback());
        wide.then(|| {
            format!(
                "the proxy at {self} lets other computers reach all that the guest reaches, its own \
                 localhost included"
            )
        })
    }
}

impl FromStr for At {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (address, port) = match text.rsplit_once(':') {
            None => (None, text),
            Some((address, port)) => {
                let bare = match address.strip_prefix('[') {
                    Some(rest) => rest.strip_suffix(']').filter(|ip| ip.contains(':')),
                    // An IPv6 address without brackets may end in what looks like a port.
                    None => Some(address).filter(|ip| !ip.contains(':')),
                };
                let parsed = bare.ok_or(SpecError::Form(FORM))?.parse();
                let parsed = parsed.map_err(|_| SpecError::Address(address.to_owned()))?;
                (Some(parsed), port)
            }
        };
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        match port.parse() {
            Ok(number) if digits && number != 0 => Ok(Self {
                address,
                port: number,
            }),
            _ => Err(SpecError::Port(port.to_owned())),
        }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            None => self.port.fmt(f),
            Some(address) => SocketAddr::new(address, self.port).fmt(f),
        }
    }
}

impl TryFrom<String> for At {
    type Error = SpecError;

    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl From<At> for String {
    fn from(at: At) -> Self {
        at.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_is_written_back() {
        for text in ["1080", "127.0.0.1:1", "[::1]:65535", "0.0.0.0:1080"] {
            assert_eq!(text.parse::<At>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_place_to_listen_is_refused() {
        for text in [
            "",
            "0",
            "70000",
            "+80",
            "x",
            "127.0.0.1",
            "127.0.0.1:",
            ":80",
            "::1:80",
            "[::1]",
            "[127.0.0.1]:80",
            "box:80",
            "1080/udp",
        ] {
            assert!(text.parse::<At>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_others_computers_are_worth_a_warning() {
        let warning = |text: &str| text.parse::<At>().unwrap().warning();
        assert_eq!(warning("1080"), None);
        assert_eq!(warning("127.0.0.2:1080"), None);
        assert!(warning("0.0.0.0:1080").unwrap().contains("0.0.0.0:1080"));
        assert!(warning("[::]:1080").is_some());
    }
}
