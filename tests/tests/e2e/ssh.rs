//! SSH in and out of a machine without a network: the caller's agent, and sshd behind `mvm ssh-config`.

use std::fs;

use tests::host::tool_command;
use tests::image::{self, Filesystem};
use tests::{Guest, Machines, Running, ssh};

#[test]
fn the_callers_agent_is_the_guests() {
    const TEST: &str = "the_callers_agent_is_the_guests";
    let Some(debian) = image::debian(Filesystem::Ext4, TEST) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let agent = ssh::start_agent(&socket);
    let key = ssh::make_key(dir.path(), "e2e-key");
    let machines = Machines::new();
    let name = machines.fresh_name("agent");
    machines
        .guest(Guest::new().rootfs_read_only(&debian).flag("--ssh-agent"))
        .environment("SSH_AUTH_SOCK", socket.to_str().unwrap())
        .option("--name", &name)
        .exec(&["sleep", "1000000"])
        .expect_code(0);
    let machine = machines.named(&name);
    let keys = || machine.exec("ssh-add -l");
    keys().expect_code(1).expect_in_stdout("no identities");
    ssh::add_key(&socket, &key);
    keys().expect_code(0).expect_in_stdout("e2e-key");

    // The agent is looked for at each use: another one at the same path is used like the first.
    drop(agent);
    // It leaves its socket behind, and another one does not take over a path that is there.
    let _ = fs::remove_file(&socket);
    // It hears that nobody answers, or dies of SIGPIPE where the connection is closed before it asks.
    let nobody = keys();
    assert!([1, 128 + 13].contains(&nobody.code()), "{nobody}");
    let _agent = ssh::start_agent(&socket);
    ssh::add_key(&socket, &key);
    keys().expect_code(0).expect_in_stdout("e2e-key");
}

#[test]
fn ssh_reaches_a_machine_by_its_configuration() {
    const TEST: &str = "ssh_reaches_a_machine_by_its_configuration";
    let Some(debian) = image::debian(Filesystem::Ext4, TEST) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let key = ssh::make_key(dir.path(), "e2e-key");
    let machines = Machines::new();
    let machine = machines.idle(Guest::new().rootfs_read_only(&debian));
    let _server = ssh::start_sshd(&machine, &key);
    let stanza = machine.mvm("ssh-config", &[]);
    stanza.expect_code(0).expect_stderr("");
    let config = dir.path().join("config");
    fs::write(&config, &stanza.stdout).unwrap();
    let host = format!("mvm-{machine}");
    let run = |words: &[&str], input: &[u8]| {
        let mut client = tool_command("ssh", "openssh-client");
        client.arg("-F").arg(&config).arg("-i").arg(&key);
        client.args(["-o", "BatchMode=yes", &host]).args(words);
        // The ProxyCommand finds the machine where this test has it.
        client.env("XDG_STATE_HOME", machines.state_dir());
        Running::start(client, input.to_vec()).wait()
    };
    run(&["cat; hostname; exit 3"], b"through ssh\n")
        .expect_code(3)
        .expect_stdout(&format!("through ssh\n{machine}\n"));
}
