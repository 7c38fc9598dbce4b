//! SSH for guests and hosts: keys, agents, and an sshd in a guest of the Debian image.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::{eventually, must_succeed, tool_command};
use crate::machine::Machine;
use crate::process::Running;

/// Makes a key in `dir` whose comment is `comment`; its private half.
pub fn make_key(dir: &Path, comment: &str) -> PathBuf {
    let key = dir.join("key");
    let mut keygen = tool_command("ssh-keygen", "openssh-client");
    keygen
        .args(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"])
        .arg(&key);
    must_succeed(keygen);
    key
}

/// Starts an agent that listens at `socket`.
pub fn start_agent(socket: &Path) -> Running {
    let mut agent = tool_command("ssh-agent", "openssh-client");
    agent.args(["-D", "-a"]).arg(socket);
    let agent = Running::start(agent, Vec::new());
    eventually("the agent is up", || socket.exists().then_some(()));
    agent
}

/// Gives a key to the agent at `socket`.
pub fn add_key(socket: &Path, key: &Path) {
    let mut add = tool_command("ssh-add", "openssh-client");
    add.arg("-q").arg(key).env("SSH_AUTH_SOCK", socket);
    must_succeed(add);
}

/// Starts sshd in the machine, on its localhost only, with `key` for root; it listens when this returns.
pub fn start_sshd(machine: &Machine<'_>, key: &Path) -> Running {
    let public = fs::read(key.with_extension("pub")).expect("a key has a public half");
    machine.plant("/tmp/authorized_keys", public);
    let script = "mkdir -p /run/sshd && ssh-keygen -A && exec /usr/sbin/sshd -D -e \
                  -o ListenAddress=127.0.0.1 -o AuthorizedKeysFile=/tmp/authorized_keys \
                  -o StrictModes=no -o PermitRootLogin=yes -o UsePAM=no -o MaxSessions=100";
    let server = machine.start(&["sh", "-c", script]);
    server.expect_stderr("Server listening");
    server
}
