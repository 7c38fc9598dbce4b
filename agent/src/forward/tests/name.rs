//! Names, resolved with the files of a guest's root and a name server of the test.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use agent::names::dns::{self, Failure, Reply};
use agent::protocol::{DialError, Open, Target};
use simple_dns::rdata::{A, AAAA, CNAME, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QTYPE, RCODE, ResourceRecord, TYPE};

use super::{PATIENCE, connect_to, start_in};
use crate::forward::names;
use crate::tree::Tree;

const V4: &str = "192.0.2.7";
const V6: &str = "2001:db8::7";

/// Answers for ever what `answer` makes of each packet: any number of packets, and for TCP the first of them.
fn serve(answer: fn(&[u8], bool) -> Vec<Vec<u8>>) -> SocketAddr {
    // A port that is free for TCP need not be free for UDP.
    let both = || {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind(tcp.local_addr().unwrap()).ok()?;
        Some((tcp, udp))
    };
    let (tcp, udp) = std::iter::repeat_with(both).flatten().next().unwrap();
    let address = tcp.local_addr().unwrap();
    thread::spawn(move || {
        let mut query = [0; 512];
        loop {
            let (length, from) = udp.recv_from(&mut query).unwrap();
            for packet in answer(&query[..length], false) {
                udp.send_to(&packet, from).unwrap();
            }
        }
    });
    thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut query = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut query).unwrap();
            let packet = answer(&query, true).remove(0);
            let length = u16::try_from(packet.len()).unwrap().to_be_bytes();
            // A byte at a time: how TCP cuts an answer means nothing.
            for byte in length.iter().chain(&packet) {
                stream.write_all(&[*byte]).unwrap();
            }
        }
    });
    address
}

/// An answer to `query`: an alias, and the address that the alias has.
fn reply(query: &[u8]) -> Packet<'_> {
    let query = Packet::parse(query).unwrap();
    let question = query.questions[0].clone();
    let mut reply = Packet::new_reply(query.id());
    let alias = || Name::new("alias.example").unwrap();
    let record = |name, data| ResourceRecord::new(name, CLASS::IN, 60, data);
    reply
        .answers
        .push(record(question.qname.clone(), RData::CNAME(CNAME(alias()))));
    let data = match question.qtype {
        QTYPE::TYPE(TYPE::A) => RData::A(A::from(V4.parse::<std::net::Ipv4Addr>().unwrap())),
        _ => RData::AAAA(AAAA::from(V6.parse::<std::net::Ipv6Addr>().unwrap())),
    };
    reply.answers.push(record(alias(), data));
    reply.questions.push(question);
    reply
}

fn bytes(packet: &Packet<'_>) -> Vec<u8> {
    packet.build_bytes_vec_compressed().unwrap()
}

fn is_for_v4(query: &[u8]) -> bool {
    Packet::parse(query).unwrap().questions[0].qtype == QTYPE::TYPE(TYPE::A)
}

fn ask(server: SocketAddr) -> Result<Reply, Failure> {
    dns::ask(server, "name.example", Instant::now() + PATIENCE)
}

fn both() -> Result<Reply, Failure> {
    Ok(Reply::Addresses(vec![
        V6.parse::<IpAddr>().unwrap(),
        V4.parse().unwrap(),
    ]))
}

#[test]
fn both_kinds_of_addresses_are_found_through_an_alias() {
    let server = serve(|query, _| vec![bytes(&reply(query))]);
    assert_eq!(ask(server), both());
}

#[test]
fn an_answer_that_does_not_fit_is_asked_for_over_tcp() {
    let server = serve(|query, over_tcp| {
        let mut reply = reply(query);
        if !over_tcp {
            reply.answers.clear();
            reply.set_flags(PacketFlag::TRUNCATION);
        }
        vec![bytes(&reply)]
    });
    assert_eq!(ask(server), both());
}

#[test]
fn what_answers_another_question_is_passed_over() {
    let server = serve(|query, _| {
        let reply = bytes(&reply(query));
        let mut other_number = reply.clone();
        other_number[0] ^= 1;
        let mut other_name = reply.clone();
        other_name[13] ^= 1;
        let no_answer = query.to_vec();
        let cut = reply[..reply.len() - 1].to_vec();
        vec![other_number, other_name, no_answer, cut, Vec::new(), reply]
    });
    assert_eq!(ask(server), both());
}

#[test]
fn no_name_and_no_address_are_told_from_a_server_that_fails() {
    let no_name = serve(|query, _| {
        let mut reply = reply(query);
        reply.answers.clear();
        *reply.rcode_mut() = RCODE::NameError;
        vec![bytes(&reply)]
    });
    assert_eq!(ask(no_name), Ok(Reply::Nothing));
    let fails = serve(|query, _| {
        let mut reply = reply(query);
        reply.answers.clear();
        *reply.rcode_mut() = RCODE::ServerFailure;
        vec![bytes(&reply)]
    });
    assert!(matches!(ask(fails), Err(Failure::Server(_))));
    // What is known of one family is enough.
    let half = serve(|query, _| {
        let mut reply = reply(query);
        if !is_for_v4(query) {
            reply.answers.clear();
            *reply.rcode_mut() = RCODE::NotImplemented;
        }
        vec![bytes(&reply)]
    });
    let v4 = Reply::Addresses(vec![V4.parse().unwrap()]);
    assert_eq!(ask(half), Ok(v4));
}

#[test]
fn a_silent_server_and_a_port_without_one_end_in_time() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let soon = Instant::now() + Duration::from_millis(50);
    let address = silent.local_addr().unwrap();
    let failure = dns::ask(address, "name.example", soon).unwrap_err();
    assert_eq!(failure, Failure::Server("it does not answer".to_owned()));
    drop(silent);
    assert!(matches!(ask(address), Err(Failure::Server(_))));
}

#[test]
fn what_is_no_name_is_not_asked_for() {
    let nobody = "127.0.0.1:1".parse().unwrap();
    for name in [
        "white space",
        "back\\slash",
        "\u{e4}",
        &"x".repeat(64),
        &"x.".repeat(200),
    ] {
        let failure = dns::ask(nobody, name, Instant::now() + PATIENCE);
        assert_eq!(failure, Err(Failure::Invalid), "{name:?}");
    }
}

#[test]
fn no_answer_however_broken_does_harm() {
    let server = serve(|query, _| {
        let valid = bytes(&reply(query));
        let mut packets = Vec::new();
        let mut state = 1u32;
        let mut next = |below: usize| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as usize % below
        };
        // More at once would not fit into the socket.
        for _ in 0..64 {
            let mut broken = valid.clone();
            for _ in 0..1 + next(8) {
                let place = 2 + next(broken.len() - 2);
                broken[place] = next(256) as u8;
            }
            broken.truncate(2 + next(broken.len()));
            packets.push(broken);
        }
        packets.push(valid);
        packets
    });
    // Some of it may pass for an answer; what matters is that the question ends.
    for _ in 0..8 {
        let _ = ask(server);
    }
}

#[test]
fn a_name_of_the_guests_hosts_file_is_connected_to() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("etc")).unwrap();
    let hosts = "# of the guest\n127.0.0.1\tDatabase database.internal\n";
    fs::write(directory.path().join("etc/hosts"), hosts).unwrap();
    let door = start_in(Tree::below(directory.path().to_str().unwrap()).unwrap());
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let host = "database.INTERNAL".to_owned();
    let mut host = connect_to(&door, &Open::Dial(Target::Host { host, port }));
    service.accept().unwrap().0.write_all(b"here").unwrap();
    let mut here = [0; 4];
    host.read_exact(&mut here).unwrap();
    assert_eq!(&here, b"here");
}

#[test]
fn a_root_without_any_files_of_names_knows_no_name() {
    let directory = tempfile::tempdir().unwrap();
    let root = Tree::below(directory.path().to_str().unwrap()).unwrap();
    let soon = Instant::now() + Duration::from_millis(500);
    let answer = names::lookup(&root, "no.such.name.example", soon);
    assert_eq!(answer, Err(DialError::NoSuchHost));
}
