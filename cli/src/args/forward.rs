//! What `mvm run` forwards between host and guest.

use clap::Args;

use crate::forward::proxy::At;
use crate::forward::spec::{PortRange, Publish, Reverse};

/// Ports, sockets and services that are passed on.
#[derive(Debug, Clone, Args)]
pub struct ForwardArgs {
    /// Publish a port, a range, or a Unix socket of the guest on the host; without HOST a free port
    #[arg(short, long, value_name = "[[IP:]HOST:]GUEST[/udp]")]
    pub publish: Vec<Publish>,

    /// Publish every port on which a program in the guest listens, as they come and go
    #[arg(long)]
    pub publish_auto: bool,

    /// Leave these ports of the guest out of --publish-auto
    #[arg(
        long,
        value_name = "PORT[-PORT]",
        value_delimiter = ',',
        requires = "publish_auto"
    )]
    pub publish_auto_exclude: Vec<PortRange>,

    /// Serve a SOCKS5 and HTTP proxy whose names and addresses are the guest's
    #[arg(long, value_name = "[IP:]PORT")]
    pub socks: Option<At>,

    /// Let the guest reach a service of the host, and no other: a port or a Unix socket
    #[arg(
        short = 'R',
        long,
        value_name = "[GUEST_IP:]GUEST:HOST[:PORT]",
        allow_hyphen_values = true
    )]
    pub reverse: Vec<Reverse>,

    /// Let the guest use the caller's SSH agent (SSH_AUTH_SOCK)
    #[arg(long)]
    pub ssh_agent: bool,
}
