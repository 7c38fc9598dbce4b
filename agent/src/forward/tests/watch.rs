//! Listening sockets, reported as they come and go.
//!
//! The tests see the sockets of this machine, so each looks for its own port only.

use std::net::{Ipv4Addr, TcpListener};

use agent::protocol::{Bind, FromForwarder, ToForwarder};

use super::control::Control;
use super::{connect_to, start};
use crate::forward::Handle;
use crate::tree::Tree;

use agent::protocol::Open;

/// The next report in which it is so that somebody listens at `port`, or that nobody does.
fn wait_for(control: &Control, port: u16, listens: bool) {
    loop {
        match control.hear() {
            FromForwarder::Listeners(listeners) => {
                let found = listeners.iter().find(|listener| listener.port == port);
                if found.is_some() == listens {
                    let mine = rustix::process::getuid().as_raw();
                    assert!(found.is_none_or(|found| found.uid == mine), "{found:?}");
                    return;
                }
            }
            other => panic!("a watch was answered with {other:?}"),
        }
    }
}

#[test]
fn sockets_that_begin_and_stop_to_listen_are_reported() {
    let before = TcpListener::bind("127.0.0.1:0").unwrap();
    let control = Control::open();
    control.say(&ToForwarder::Watch(true));
    wait_for(&control, before.local_addr().unwrap().port(), true);
    for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address) else {
            continue;
        };
        let port = listener.local_addr().unwrap().port();
        wait_for(&control, port, true);
        drop(listener);
        wait_for(&control, port, false);
    }
}

#[test]
fn who_begins_to_watch_later_is_told_all_there_is() {
    let first = Control::open();
    first.say(&ToForwarder::Watch(true));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    wait_for(&first, port, true);
    let second = Control::open();
    second.say(&ToForwarder::Watch(true));
    wait_for(&second, port, true);
    first.say(&ToForwarder::Watch(false));
    first.say(&ToForwarder::Watch(true));
    wait_for(&first, port, true);
    drop(first);
    drop(listener);
    wait_for(&second, port, false);
}

#[test]
fn sockets_at_which_the_agent_listens_are_not_reported() {
    let watcher = Control::open();
    let port = watcher
        .listen(
            1,
            Bind::Tcp {
                address: None,
                port: 0,
            },
        )
        .unwrap();
    watcher.say(&ToForwarder::Watch(true));
    let mark = TcpListener::bind("127.0.0.1:0").unwrap();
    let mark = mark.local_addr().unwrap().port();
    loop {
        let FromForwarder::Listeners(listeners) = watcher.hear() else {
            panic!("no report");
        };
        assert!(!listeners.iter().any(|listener| listener.port == port));
        if listeners.iter().any(|listener| listener.port == mark) {
            return;
        }
    }
}

#[test]
fn a_report_that_somebody_waits_for_comes_first() {
    let handle = Handle::new().unwrap();
    let door = start(handle.clone(), Tree::own().unwrap(), |_, _| {});
    // Nobody watches: there is nothing to wait for.
    handle.report_listeners();
    let control = Control(connect_to(&door, &Open::Forward));
    control.say(&ToForwarder::Watch(true));
    control.hear();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    handle.report_listeners();
    control.0.set_nonblocking(true).unwrap();
    let mut reported = false;
    // All that was reported until then is there to be read.
    while let Ok(Some(FromForwarder::Listeners(listeners))) = agent::protocol::receive(&control.0) {
        let port = listener.local_addr().unwrap().port();
        reported |= listeners.iter().any(|listener| listener.port == port);
    }
    assert!(reported);
}
