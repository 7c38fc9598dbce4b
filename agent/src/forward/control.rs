//! A connection that controls forwards: what the host asks for on it, and what it is told.

use std::os::fd::OwnedFd;

use agent::protocol::ToForwarder;

use super::frames::{self, Arrival, Frames};
use super::reactor::{Reactor, State};
use super::slots::Index;

/// The longest message that the host has a reason to send, with room to spare.
const MAX_MESSAGE: usize = 64 << 10;

/// What a host that does not read is kept waiting; with more than that it is taken for gone.
const MAX_BACKLOG: usize = 4 << 20;

/// Tells connections that control forwards apart, and what belongs to each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(u64);

/// A connection that controls forwards.
#[derive(Debug)]
pub struct Control {
    owner: Owner,
    frames: Frames,
}

impl Reactor {
    /// Takes over a connection that is to control forwards.
    pub(super) fn control(&mut self, index: Index, connection: OwnedFd) -> State {
        let owner = Owner(self.number());
        self.controls.insert(owner, index);
        self.states.enqueue(index);
        State::Control(Box::new(Control {
            owner,
            frames: Frames::new(connection, MAX_MESSAGE),
        }))
    }

    /// Does what the host asks for, as far as it has asked.
    pub(super) fn obey(&mut self, index: Index, mut control: Box<Control>) -> Option<State> {
        let mut messages: Vec<ToForwarder> = Vec::new();
        let frames = &mut control.frames;
        let read = self.with_buffer(|buffer| {
            frames.flush()?;
            frames.read(buffer, |frame| {
                messages.push(postcard::from_bytes(frame).map_err(frames::invalid)?);
                Ok(())
            })
        });
        for message in messages {
            self.carry_out(&control, message);
        }
        match read {
            Ok(Arrival::More) => self.states.enqueue(index),
            Ok(Arrival::Dry) => {}
            Ok(Arrival::End) => {
                self.dismiss(&control);
                return None;
            }
            Err(error) => {
                eprintln!("mvm-agent: the host's connection for forwards ended early: {error}");
                self.dismiss(&control);
                return None;
            }
        }
        Some(State::Control(control))
    }

    fn carry_out(&mut self, control: &Control, message: ToForwarder) {
        match message {
            ToForwarder::Watch(on) => self.watch(control.owner, on),
            ToForwarder::Dial { token, target } => self.dial_for(control.owner, token, target),
            ToForwarder::Drop { token } => self.drop_held(token),
            ToForwarder::Listen { id, at } => self.listen(control.owner, id, at),
            ToForwarder::Unlisten { id } => self.unlisten(control.owner, id),
        }
    }

    /// Tells controls what happened, besides those that ended since.
    pub(super) fn tell(&mut self) {
        for (owner, message) in std::mem::take(&mut self.told) {
            let Some(&index) = self.controls.get(&owner) else {
                continue;
            };
            let Some(State::Control(control)) = self.states.get_mut(index) else {
                continue;
            };
            let told = control.frames.push(&message);
            let is_stuck = control.frames.backlog() > MAX_BACKLOG;
            if (told.is_err() || is_stuck)
                && let Some(State::Control(control)) = self.states.take(index)
            {
                eprintln!("mvm-agent: the host does not listen to its forwards any more");
                self.states.free(index);
                self.dismiss(&control);
            }
        }
    }

    /// Ends all that belongs to a control; connections that are joined go on.
    fn dismiss(&mut self, control: &Control) {
        let owner = control.owner;
        self.controls.remove(&owner);
        self.watch(owner, false);
        let belongs = |state: &mut State| match state {
            State::Resolving(resolving) => resolving.is_of(owner),
            State::Dialing(dial) => dial.is_of(owner),
            State::Held(held) => held.is_of(owner),
            State::Listening(listening) => listening.owner == owner,
            _ => false,
        };
        for state in self.states.drain(belongs) {
            self.drop_state(state);
        }
    }
}
