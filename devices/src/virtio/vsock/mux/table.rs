//! All connections of a device: found by their ports, by their slot, or by their epoll token.

use std::collections::HashMap;

use crate::virtio::vsock::connection::Connection;

/// What tells one connection from another: both ends' context ids are fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::virtio::vsock) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

#[derive(Debug, Default)]
struct Slot {
    /// Changes with every connection, so that an event for one before is not taken for this one's.
    generation: u32,
    /// The slot stands in the queue of those with something to send. It stays there when its
    /// connection goes, so that the queue is never longer than the table.
    queued: bool,
    connection: Option<Connection>,
}

/// Connections in slots that are used again.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
}

impl Table {
    /// Connections in the table.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The slot of the connection that the guest knows by `key`.
    pub fn find(&self, key: Key) -> Option<usize> {
        self.by_key.get(&key).copied()
    }

    /// Puts a connection in; its key must not be there.
    pub fn insert(&mut self, connection: Connection) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.by_key.insert(connection.key, index);
        let slot = &mut self.slots[index];
        slot.generation = slot.generation.wrapping_add(1);
        slot.connection = Some(connection);
        index
    }

    /// Makes the key free for another connection; this one stays.
    pub fn forget_key(&mut self, key: Key, index: usize) {
        if self.by_key.get(&key) == Some(&index) {
            self.by_key.remove(&key);
        }
    }

    /// Takes a connection out.
    pub fn remove(&mut self, index: usize) -> Option<Connection> {
        let connection = self.slots.get_mut(index)?.connection.take()?;
        self.forget_key(connection.key, index);
        self.free.push(index);
        Some(connection)
    }

    /// The connection in a slot.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut Connection> {
        self.slots.get_mut(index)?.connection.as_mut()
    }

    /// The epoll token of a slot's connection.
    pub fn token(&self, index: usize) -> u64 {
        let generation = self.slots.get(index).map_or(0, |slot| slot.generation);
        u64::from(generation) << 32 | index as u64
    }

    /// The slot that a token stands for, unless its connection is gone.
    pub fn find_token(&self, token: u64) -> Option<usize> {
        let index = (token & u64::from(u32::MAX)) as usize;
        let slot = self.slots.get(index)?;
        let current = slot.connection.is_some() && u64::from(slot.generation) == token >> 32;
        current.then_some(index)
    }

    /// Notes that a slot stands in the queue, or does not; returns what held before.
    pub fn set_queued(&mut self, index: usize, queued: bool) -> bool {
        self.slots
            .get_mut(index)
            .is_some_and(|slot| std::mem::replace(&mut slot.queued, queued))
    }

    /// All connections with their slots.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut Connection)> {
        let slots = self.slots.iter_mut().enumerate();
        slots.filter_map(|(index, slot)| Some((index, slot.connection.as_mut()?)))
    }
}
