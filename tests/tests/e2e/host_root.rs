//! The host's own root as the machine's: its tools work on the caller's project, and what is nobody's business
//! is not there.

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;
use tests::host;
use tests::{Guest, Machines, Output, Running, User};

/// Somebody without privileges.
const USER: u32 = 4322;

const MAKEFILE: &str = "test: greet\n\t./greet | grep '^hello$$'\n\tid -u > owner\n\
    greet: greet.c\n\t$(CC) -o $@ greet.c\n";
const PROGRAM: &str = "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 0; }\n";

/// A home with a project and a toolchain in it, and with what nobody is to see.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let home = Self { dir };
        home.write("project/Makefile", MAKEFILE, 0o644);
        home.write("project/greet.c", PROGRAM, 0o644);
        home.write(
            ".cargo/bin/tool",
            "#!/bin/sh\necho tool: $(cat $HOME/.cargo/own)\n",
            0o755,
        );
        home.write(".cargo/own", "my own", 0o600);
        home.write(".cargo/credentials.toml", "secret", 0o644);
        home.write(".cargo/deep/.netrc", "secret", 0o644);
        home.write(".ssh/id_rsa", "secret", 0o600);
        home.write("data/public", "public", 0o600);
        home.write("data/private", "private", 0o600);
        fs::set_permissions(home.path("."), Permissions::from_mode(0o711)).unwrap();
        home
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str, content: &str, mode: u32) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }

    fn search_path(&self) -> String {
        format!(
            "{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            self.path(".cargo/bin").display()
        )
    }

    /// A machine of whoever has this home, in a directory of it.
    fn guest(&self, directory: &str) -> Guest {
        Guest::of_host(&self.path(directory))
            .environment("HOME", self.dir.path().to_str().unwrap())
            .environment("PATH", self.search_path())
            .environment("XDG_CACHE_HOME", host::cache().to_str().unwrap())
    }
}

/// Whether the host has what the project is built with.
fn can_build(test: &str) -> bool {
    let search = env::var_os("PATH").unwrap_or_default();
    let has = |name: &str| env::split_paths(&search).any(|dir| dir.join(name).is_file());
    let missing = ["make", "cc"].into_iter().find(|name| !has(name));
    if let Some(name) = missing {
        host::skipped(test, &format!("this host has no {name}"));
    }
    missing.is_none()
}

/// Runs `script` in a machine, which leaves nothing behind.
#[track_caller]
fn script(guest: Guest, script: &str) -> Output {
    let output = guest.run(script);
    output.expect_nothing_left();
    output
}

#[test]
fn a_project_is_built_and_tested_with_the_hosts_tools() {
    if !can_build("a_project_is_built_and_tested_with_the_hosts_tools") {
        return;
    }
    let home = Home::new();
    let output = home.guest("project").exec(&["make", "-s", "test"]);
    output
        .expect_code(0)
        .expect_stdout("hello\n")
        .expect_nothing_left();
    let me = rustix::process::geteuid().as_raw();
    for name in ["greet", "owner"] {
        let made = fs::metadata(home.path("project").join(name)).unwrap();
        assert_eq!(made.uid(), me, "the owner of {name}");
    }
    let owner = fs::read_to_string(home.path("project/owner")).unwrap();
    assert_eq!(owner.trim(), me.to_string(), "the user in the guest");
}

#[test]
fn a_crate_is_built_with_the_hosts_cargo_and_again_after_the_host_has_changed_it() {
    let project = tempfile::tempdir().unwrap();
    let at = |name: &str| project.path().join(name);
    let manifest = "[package]\nname = \"greet\"\nedition = \"2024\"\n";
    fs::write(at("Cargo.toml"), manifest).unwrap();
    fs::create_dir(at("src")).unwrap();
    let program = |said: &str| format!("fn main() {{ println!(\"{said}\"); }}\n");
    fs::write(at("src/main.rs"), program("hello")).unwrap();
    // What the outer environment says of cargo is for the tests' own.
    let script = "export CARGO_TARGET_DIR=target
        cargo build --quiet --offline && target/debug/greet && sync && echo built
        until grep -q again src/main.rs; do sleep 0.1; done
        cargo build --quiet --offline && target/debug/greet";
    let guest = Guest::of_host(project.path()).start(&["sh", "-c", script]);
    guest.expect_stdout("built\n");
    assert!(at("target/debug/greet").is_file());
    fs::write(at("src/main.rs"), program("hello again")).unwrap();
    let output = guest.wait();
    output
        .expect_code(0)
        .expect_stdout("hello\nbuilt\nhello again\n")
        .expect_nothing_left();
    let made = fs::metadata(at("target/debug/greet")).unwrap();
    assert_eq!(made.uid(), rustix::process::geteuid().as_raw());
}

#[test]
fn what_is_nobodys_business_is_not_there_for_the_guests_root_either() {
    let home = Home::new();
    symlink("../.ssh/id_rsa", home.path("project/link")).unwrap();
    fs::hard_link(
        home.path(".cargo/credentials.toml"),
        home.path(".cargo/innocent"),
    )
    .unwrap();
    let output = script(
        home.guest("project").option("-u", "root"),
        "cd ..; HOME=$PWD; tool; ls -A | sort; ls -A .cargo .cargo/deep | sort
         for path in /etc/shadow /etc/gshadow /etc/machine-id /etc/ssl/private /srv /mnt /boot \\
             .ssh .ssh/id_rsa .cargo/credentials.toml .cargo/innocent .cargo/deep/.netrc data; do
             if cat $path 2>/dev/null || ls $path 2>/dev/null; then echo $path is there; fi
         done
         find /etc -name 'shadow*' -o -name 'ssh_host_*_key'
         cat project/link 2>/dev/null && echo the link leads there
         find /etc /usr/bin -type b -o -type c -o -type p -o -type s
         (echo > /etc/shadow) && rm /usr/bin/env && echo changed",
    );
    output.expect_stdout(
        "tool: my own\n.cargo\nproject\n\n.cargo/deep:\n.cargo:\nbin\ndeep\nown\nchanged\n",
    );
    assert!(Path::new("/usr/bin/env").exists(), "what the guest removed");
}

#[test]
fn paths_are_shown_and_hidden_and_the_rest_is_as_on_the_host() {
    let home = Home::new();
    fs::create_dir(home.path("out")).unwrap();
    let data = home.path("data");
    let guest = home
        .guest("project")
        .option("--host-path", &data)
        .option("--host-path", format!("{}:rw", home.path("out").display()))
        .option("--no-host-path", data.join("private"))
        .option("--no-host-path", "/opt")
        .option("--no-host-path", "../.cargo");
    let output = script(
        guest,
        "cat ../data/public; echo; ls -A ../data ..; ls -d /opt 2>/dev/null; pwd
         echo made > ../out/made; echo made > ../data/made; echo made > here; stat -c %a /tmp /var/tmp
         echo $PATH; echo $HOME; sort --version | head -n 1",
    );
    let expected = format!(
        "public\n..:\ndata\nout\nproject\n\n../data:\npublic\n{}\n1777\n1777\n{}\n{}\n",
        home.path("project").display(),
        home.search_path(),
        home.dir.path().display(),
    );
    output.expect_code(0).expect_in_stdout(&expected);
    assert_eq!(fs::read_to_string(home.path("out/made")).unwrap(), "made\n");
    assert_eq!(
        fs::read_to_string(home.path("project/here")).unwrap(),
        "made\n"
    );
    assert!(!data.join("made").exists());
}

#[test]
fn a_home_is_no_project() {
    let home = Home::new();
    let output = script(home.guest("."), "pwd; echo made > made; ls -A | sort");
    let expected = format!("{}\n.cargo\nmade\n", home.dir.path().display());
    output
        .expect_code(0)
        .expect_stdout(&expected)
        .expect_in_stderr("the working directory is not shared, as")
        .expect_in_stderr("is your home directory");
    assert!(!home.path("made").exists());
}

#[test]
fn what_would_be_there_is_listed_without_a_machine() {
    let home = Home::new();
    let explain = |options: &[&str]| {
        let mut command = Command::new(host::mvm());
        command
            .args(["run", "--explain"])
            .args(options)
            .current_dir(home.path("project"))
            .env("HOME", home.dir.path())
            .env("PATH", home.search_path());
        Running::start(command, Vec::new()).wait()
    };
    let volume = format!("{}:/elsewhere", home.path("out").display());
    let output = explain(&["--format", "json", "--host-path", "../data", "-v", &volume]);
    output.expect_code(0).expect_stderr("");
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let access = |path: &Path| {
        let paths = listed["paths"].as_array().unwrap();
        let found = paths
            .iter()
            .find(|entry| entry["path"] == path.to_str().unwrap());
        found.map_or("", |entry| entry["access"].as_str().unwrap())
    };
    for (path, expected) in [
        (PathBuf::from("/usr"), "read"),
        (PathBuf::from("/etc"), "read"),
        (PathBuf::from("/root"), ""),
        (PathBuf::from("/etc/shadow"), "hidden"),
        (home.path("project"), "write"),
        (home.path("data"), "read-all"),
        (home.path("out"), "write"),
        (home.path(".cargo"), "read-own"),
        (home.path(".cargo/credentials.toml"), "hidden"),
        (home.path(".ssh"), ""),
    ] {
        assert_eq!(access(&path), expected, "{}", path.display());
    }
    assert_eq!(listed["workdir"], home.path("project").to_str().unwrap());
    explain(&[])
        .expect_code(0)
        .expect_in_stdout("PATH names")
        .expect_in_stdout("working directory");
    explain(&["--rootfs", "none"]).expect_code(2);
    explain(&["--host-path", "/"])
        .expect_code(125)
        .expect_in_stderr("the whole of / is never shown");
}

#[test]
fn a_machine_in_the_background_has_the_callers_tools_when_it_is_started_again() {
    let home = Home::new();
    let machines = Machines::new();
    let machine = machines.run(
        home.guest("project"),
        &["sh", "-c", "tool > said; sleep 100000"],
    );
    let said = || fs::read_to_string(home.path("project/said")).unwrap_or_default();
    host::eventually("the tool runs", || {
        (said() == "tool: my own\n").then_some(())
    });
    fs::remove_file(home.path("project/said")).unwrap();
    let mut restart = machine.command("restart", &["-t", "1"]);
    restart
        .env("HOME", home.dir.path())
        .env("XDG_CACHE_HOME", host::cache());
    Running::start(restart, Vec::new()).wait().expect_code(0);
    host::eventually("the tool runs again", || {
        (said() == "tool: my own\n").then_some(())
    });
}

#[test]
fn another_command_runs_as_the_first_one_does() {
    let home = Home::new();
    let machines = Machines::new();
    let guest = home.guest("project").option("-e", "COLOUR=red");
    let machine = machines.idle(guest);
    let asked = "tool; pwd; echo $COLOUR; id -u";
    let me = rustix::process::getuid().as_raw();
    let project = home.path("project");
    machine
        .exec(asked)
        .expect_code(0)
        .expect_stdout(&format!("tool: my own\n{}\nred\n{me}\n", project.display()));
    let options = ["-e", "COLOUR=blue", "-w", "/usr", "-u", "root"];
    let command = machine.exec_command(&options, &["sh", "-c", "pwd; echo $COLOUR; id -u"]);
    let output = Running::start(command, Vec::new()).wait();
    output.expect_code(0).expect_stdout("/usr\nblue\n0\n");
}

#[test]
fn what_the_host_replaces_removes_and_adds_below_the_root_is_seen() {
    let home = Home::new();
    let data = home.path("data");
    let machines = Machines::new();
    let machine = machines.idle(home.guest("project").option("--host-path", &data));
    let at = |name: &str| data.join(name).display().to_string();
    let replace = |name: &str, content: &str| {
        home.write("data/new", content, 0o644);
        fs::rename(home.path("data/new"), data.join(name)).unwrap();
    };
    // Known to the guest, and known not to be there.
    let look = format!(
        "cat {} {}; test ! -e {}",
        at("public"),
        at("private"),
        at("late")
    );
    machine
        .exec(&look)
        .expect_code(0)
        .expect_stdout("publicprivate");
    replace("public", "replaced");
    replace("late", "late");
    fs::remove_file(data.join("private")).unwrap();
    let look = format!(
        "cat {} {}; test ! -e {}",
        at("public"),
        at("late"),
        at("private")
    );
    let mut seen = String::new();
    let as_is = host::poll(|| {
        let output = machine.exec(&look);
        seen = format!("{output}");
        (output.code() == 0 && output.text() == "replacedlate").then_some(())
    });
    assert!(as_is.is_some(), "the guest still sees:\n{seen}");
}

#[test]
fn a_user_without_privileges_has_their_own_name_and_files() {
    let test = "a_user_without_privileges_has_their_own_name_and_files";
    let Some(user) = User::new(test, USER) else {
        return;
    };
    let home = Home::new();
    user.give(home.dir.path());
    let guest = home.guest("project").by(&user);
    let said = "id -u; tool; echo mine > made; stat -c %u made /etc/passwd $HOME; cat ~/.ssh/id_rsa
        cat /etc/shadow; touch /usr/x; touch ~/x && ls ~/x";
    let output = guest.run(said);
    let file = home.path("x");
    output.expect_code(0).expect_stdout(&format!(
        "{USER}\ntool: my own\n{USER}\n0\n{USER}\n{}\n",
        file.display()
    ));
    assert_eq!(fs::metadata(home.path("project/made")).unwrap().uid(), USER);
    assert!(!file.exists());
}
