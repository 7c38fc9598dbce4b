//! What a guest that means harm can send: it reaches nothing but the share, and breaks nothing.

mod bounds;
mod guest;
mod prompt;
mod races;
mod reach;
mod refused;
mod view;
