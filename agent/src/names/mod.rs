//! Names, resolved without a C library, as a static one has no `getaddrinfo`: `/etc/hosts`, then the servers
//! of `/etc/resolv.conf`.
//!
//! The agent resolves names of the guest with it, and `mvm` those of the host.

pub mod dns;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::{Duration, Instant};

use self::dns::{Failure, Reply};
use crate::protocol::DialError;

/// Name servers that are asked, as with any C library.
const MAX_SERVERS: usize = 3;

/// Suffixes that are tried.
const MAX_SUFFIXES: usize = 8;

/// Addresses that are tried.
const MAX_ADDRESSES: usize = 16;

/// What a machine knows of names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    /// Its `/etc/hosts`; empty where there is none.
    pub hosts: String,
    /// Its `/etc/resolv.conf`; empty where there is none.
    pub resolv_conf: String,
}

/// Whether a name is the machine itself by definition (RFC 6761).
pub fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// Whether there is no such name by definition (RFC 6761), whatever a server says.
fn is_invalid(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    name == "invalid" || name.ends_with(".invalid")
}

/// All addresses of `name`, those first that this machine has a way to; not empty.
///
/// Returns by `deadline`, more or less: a question that is under way is not begun again.
pub fn lookup(files: &Files, name: &str, deadline: Instant) -> Result<Vec<IpAddr>, DialError> {
    let mut addresses = in_hosts(&files.hosts, name);
    if addresses.is_empty() {
        if is_invalid(name) {
            return Err(DialError::NoSuchHost);
        }
        addresses = Configuration::parse(&files.resolv_conf).ask(name, deadline)?;
    }
    addresses.truncate(MAX_ADDRESSES);
    addresses.sort_by_key(|address| !is_routed(*address));
    Ok(addresses)
}

/// The addresses that a hosts file has for `name`.
fn in_hosts(hosts: &str, name: &str) -> Vec<IpAddr> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut found = Vec::new();
    for line in hosts.lines() {
        let entry = line.split('#').next().unwrap_or_default();
        let mut words = entry.split_ascii_whitespace();
        let Some(Ok(address)) = words.next().map(str::parse::<IpAddr>) else {
            continue;
        };
        if words.any(|word| word.eq_ignore_ascii_case(name)) && !found.contains(&address) {
            found.push(address);
        }
    }
    found
}

/// Whether there is a way to `address`: no packet is sent to find out.
fn is_routed(address: IpAddr) -> bool {
    let any: SocketAddr = match address {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    UdpSocket::bind(any).is_ok_and(|socket| socket.connect((address, 53)).is_ok())
}

/// What resolv.conf says.
#[derive(Debug, PartialEq, Eq)]
struct Configuration {
    servers: Vec<SocketAddr>,
    /// No server is named: there may be none.
    is_bare: bool,
    /// Suffixes for names that are not complete.
    search: Vec<String>,
    /// A name with this many dots is first tried as it is.
    dots: usize,
    /// How long to wait for one server.
    timeout: Duration,
    /// How often each server is asked.
    attempts: usize,
}

impl Configuration {
    /// Reads what is known and passes over the rest, as C libraries do.
    fn parse(text: &str) -> Self {
        let mut parsed = Self {
            servers: Vec::new(),
            is_bare: false,
            search: Vec::new(),
            dots: 1,
            timeout: Duration::from_secs(5),
            attempts: 2,
        };
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => parsed.servers.extend(words.next().and_then(server)),
                Some("domain") => parsed.search = words.take(1).map(str::to_owned).collect(),
                Some("search") => {
                    parsed.search = words.take(MAX_SUFFIXES).map(str::to_owned).collect();
                }
                Some("options") => words.for_each(|option| parsed.take_option(option)),
                _ => {}
            }
        }
        parsed.servers.truncate(MAX_SERVERS);
        if parsed.servers.is_empty() {
            parsed.is_bare = true;
            parsed.servers.push((Ipv4Addr::LOCALHOST, dns::PORT).into());
        }
        parsed
    }

    fn take_option(&mut self, option: &str) {
        let Some((name, Ok(value))) = option
            .split_once(':')
            .map(|(name, value)| (name, value.parse::<usize>()))
        else {
            return;
        };
        match name {
            "ndots" => self.dots = value.min(15),
            "timeout" => self.timeout = Duration::from_secs(value.clamp(1, 30) as u64),
            "attempts" => self.attempts = value.clamp(1, 5),
            _ => {}
        }
    }

    /// The names to ask for, in this order.
    fn candidates(&self, name: &str) -> Vec<String> {
        if let Some(complete) = name.strip_suffix('.') {
            return vec![complete.to_owned()];
        }
        let suffixes = self.search.iter().map(|suffix| suffix.trim_matches('.'));
        let mut candidates: Vec<String> = suffixes
            .filter(|suffix| !suffix.is_empty())
            .map(|suffix| format!("{name}.{suffix}"))
            .collect();
        let is_complete = name.bytes().filter(|byte| *byte == b'.').count() >= self.dots;
        let place = if is_complete { 0 } else { candidates.len() };
        candidates.insert(place, name.to_owned());
        candidates
    }

    fn ask(&self, name: &str, deadline: Instant) -> Result<Vec<IpAddr>, DialError> {
        let mut failure = None;
        for candidate in self.candidates(name) {
            match self.ask_for(&candidate, deadline) {
                Ok(Reply::Addresses(addresses)) => return Ok(addresses),
                Ok(Reply::Nothing) => {}
                Err(reason) => failure = Some(reason),
            }
        }
        Err(match failure {
            None => DialError::NoSuchHost,
            Some(Failure::Invalid) => DialError::NoSuchHost,
            // Names are what the hosts file has, here.
            Some(Failure::Server(_)) if self.is_bare => DialError::NoSuchHost,
            Some(Failure::Server(reason)) => DialError::Other(format!(
                "the name servers do not tell the address of {name}: {reason}"
            )),
        })
    }

    fn ask_for(&self, name: &str, deadline: Instant) -> Result<Reply, Failure> {
        let mut failure = Failure::Server("no time was left to ask".to_owned());
        for _ in 0..self.attempts {
            for server in &self.servers {
                let patience = deadline.min(Instant::now() + self.timeout);
                match dns::ask(*server, name, patience) {
                    Err(Failure::Server(reason)) => {
                        failure = Failure::Server(format!("{server}: {reason}"));
                    }
                    told => return told,
                }
                if Instant::now() >= deadline {
                    return Err(failure);
                }
            }
        }
        Err(failure)
    }
}

/// The address of a `nameserver` line; a link-local one has its interface behind a `%`.
fn server(text: &str) -> Option<SocketAddr> {
    let (address, interface) = text.split_once('%').unwrap_or((text, ""));
    match address.parse().ok()? {
        IpAddr::V6(address) if !interface.is_empty() => {
            let scope = interface.parse().ok().or_else(|| index_of(interface))?;
            Some(SocketAddrV6::new(address, dns::PORT, 0, scope).into())
        }
        address => Some(SocketAddr::new(address, dns::PORT)),
    }
}

/// The number of a network interface.
fn index_of(interface: &str) -> Option<u32> {
    let any = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    rustix::net::netdevice::name_to_index(&any, interface).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn localhost_and_what_is_below_it_are_the_machine_itself() {
        for name in ["localhost", "LocalHost", "localhost.", "app.localhost"] {
            assert!(is_localhost(name), "{name}");
        }
        for name in ["localhost.example", "notlocalhost", "", "."] {
            assert!(!is_localhost(name), "{name}");
        }
    }

    #[test]
    fn a_hosts_file_gives_all_addresses_of_a_name_in_any_case() {
        let hosts = "127.0.0.1 localhost\n10.1.2.3\tdb Database # db.example\n\
                     fe80::1 db\nnonsense db\n10.1.2.3 db\n# 10.9.9.9 db\n";
        let v4: IpAddr = "10.1.2.3".parse().unwrap();
        let v6: IpAddr = "fe80::1".parse().unwrap();
        assert_eq!(in_hosts(hosts, "DB"), [v4, v6]);
        assert_eq!(in_hosts(hosts, "database."), [v4]);
        assert_eq!(in_hosts(hosts, "db.example"), [] as [IpAddr; 0]);
    }

    #[test]
    fn resolv_conf_is_read_as_c_libraries_read_it() {
        let text = "; comment\nnameserver 10.0.0.1\nnameserver nonsense\nnameserver fd00::1\n\
                    domain ignored.example\nsearch a.example b.example.\n\
                    options ndots:2 timeout:1 rotate attempts:99\nnameserver 10.0.0.2\n\
                    nameserver 10.0.0.3\n";
        let parsed = Configuration::parse(text);
        let servers = ["10.0.0.1:53", "[fd00::1]:53", "10.0.0.2:53"];
        assert_eq!(parsed.servers, servers.map(|text| text.parse().unwrap()));
        assert_eq!((parsed.dots, parsed.attempts), (2, 5));
        assert_eq!(parsed.timeout, Duration::from_secs(1));
        assert_eq!(
            parsed.candidates("x.y"),
            ["x.y.a.example", "x.y.b.example", "x.y"]
        );
        assert_eq!(
            parsed.candidates("x.y.z"),
            ["x.y.z", "x.y.z.a.example", "x.y.z.b.example"]
        );
        assert_eq!(parsed.candidates("x."), ["x"]);
    }

    #[test]
    fn where_no_server_is_named_and_none_answers_there_is_no_such_host() {
        let files = Files::default();
        let deadline = Instant::now() + Duration::from_secs(2);
        let answer = lookup(&files, "no.such.name.example", deadline);
        assert_eq!(answer, Err(DialError::NoSuchHost));
    }

    #[test]
    fn there_is_no_invalid_host_and_no_server_is_asked() {
        let files = Files {
            resolv_conf: "nameserver 192.0.2.1".to_owned(),
            ..Files::default()
        };
        for name in ["invalid", "no-such-host.INVALID."] {
            let answer = lookup(&files, name, Instant::now());
            assert_eq!(answer, Err(DialError::NoSuchHost), "{name}");
        }
    }

    #[test]
    fn without_a_name_server_this_machine_is_asked() {
        let parsed = Configuration::parse("options ndots:x timeout: :\nnameserver\n");
        assert_eq!(parsed.servers, ["127.0.0.1:53".parse().unwrap()]);
        assert_eq!((parsed.dots, parsed.attempts), (1, 2));
    }
}
