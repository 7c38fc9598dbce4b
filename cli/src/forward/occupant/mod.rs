//! Who has a port of this host, as far as a user can know.

mod bound;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use agent::sock_diag::Socket;

use super::spec::Protocol;

/// Who has the port, to be read after "in use by".
pub fn of(at: SocketAddr, protocol: Protocol) -> String {
    let mut sockets = Vec::new();
    for family in ["", "6"] {
        // A host may be without IPv6, or without /proc.
        let table = fs::read_to_string(format!("/proc/net/{protocol}{family}"));
        sockets.extend(table.unwrap_or_default().lines().filter_map(parse));
    }
    if protocol == Protocol::Tcp {
        match bound::sockets() {
            Ok(bound) => sockets.extend(bound),
            Err(error) => tracing::debug!("sockets without a connection are not told: {error}"),
        }
    }
    // What is winding down belongs to nobody any more, and has no inode.
    sockets.retain(|socket| socket.inode != 0 && is_in_the_way(socket.local, at));
    let mut programs = sockets.iter().filter_map(|socket| program(socket.inode));
    match (programs.next(), sockets.first()) {
        (Some(program), _) => program,
        (None, Some(socket)) => format!("a program of {}", user(socket.uid)),
        (None, None) => "another program".to_owned(),
    }
}

/// One line: `sl local_address rem_address st tx:rx tr:tm retrnsmt uid timeout inode …`.
fn parse(line: &str) -> Option<Socket> {
    let mut fields = line.split_ascii_whitespace();
    let local = fields.nth(1)?;
    let uid = fields.nth(5)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    let (ip, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of 32 bits in the host's order, of addresses in the network's.
    let word = |from: usize| {
        let word = u32::from_str_radix(ip.get(from..from + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some(Socket {
        local: SocketAddr::new(ip, port),
        uid,
        inode,
    })
}

/// Whether a socket at `local` keeps others from `wanted`.
fn is_in_the_way(local: SocketAddr, wanted: SocketAddr) -> bool {
    let (ip, other) = (local.ip().to_canonical(), wanted.ip());
    let wide = |ip: IpAddr| ip.is_unspecified();
    // A socket at `::` takes IPv4 as well, unless it said otherwise.
    local.port() == wanted.port() && (ip == other || wide(ip) || wide(other))
}

/// The program that has the socket, of those whose descriptors this user may see.
fn program(inode: u64) -> Option<String> {
    let link = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let mut targets = descriptors
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok());
        if targets.any(|target| target.as_os_str() == link.as_str()) {
            return Some(describe(&process.path(), pid));
        }
    }
    None
}

/// A process by name and number. The name is its own choice, so it is cut and cleaned.
fn describe(process: &Path, pid: u32) -> String {
    if pid == std::process::id() {
        return "this machine itself".to_owned();
    }
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    let name: String = name
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(32)
        .collect();
    match name.is_empty() {
        true => format!("process {pid}"),
        false => format!("{name} (process {pid})"),
    }
}

/// A user by name, where the password file knows it.
fn user(uid: u32) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    name.map_or_else(|| format!("user {uid}"), |name| format!("user {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::listener::bind_like;
    use std::net::TcpListener;

    #[test]
    fn lines_of_both_families_are_read_and_others_are_not() {
        let four = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4242 1 0000 100 0 0 10 0";
        let four = parse(four).unwrap();
        assert_eq!(four.local, "127.0.0.1:8080".parse().unwrap());
        assert_eq!((four.uid, four.inode), (1000, 4242));
        let six = "   1: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 7 1 0000 100 0 0 10 0";
        assert_eq!(parse(six).unwrap().local, "[::1]:80".parse().unwrap());
        for line in [
            "",
            "  sl  local_address rem_address   st",
            "0: zz:1 0 0 0 0 0 0 0 0 0",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_port_that_is_taken_and_does_not_listen_is_found_with_its_process() {
        if !kernel_tells() {
            return;
        }
        let (port, _sockets) = bind_like(None, 20_000, Protocol::Tcp).unwrap();
        let at = SocketAddr::new("127.0.0.1".parse().unwrap(), port);
        assert_eq!(of(at, Protocol::Tcp), "this machine itself");
    }

    /// Whether this kernel tells of sockets that have a port and nothing else.
    fn kernel_tells() -> bool {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release
            .split(['.', '-'])
            .map(|part| part.parse().unwrap_or(0));
        let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
        version >= (6, 8)
    }

    #[test]
    fn a_listener_is_found_with_its_process() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        assert_eq!(of(at, Protocol::Tcp), "this machine itself");
        assert_eq!(
            of(
                SocketAddr::new("0.0.0.0".parse().unwrap(), at.port()),
                Protocol::Tcp
            ),
            "this machine itself"
        );
        drop(listener);
    }
}
