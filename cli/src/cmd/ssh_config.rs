//! `mvm ssh-config`: what an SSH client needs to know of a machine, for its configuration file.

use std::env;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

/// Prints the stanza of the machine `name`, in which `user` logs in.
pub fn run(name: &str, user: &str) -> Result<ExitCode> {
    let stanza = stanza(&program(), name, user)?;
    io::stdout().write_all(stanza.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// This program by its path, or by its name where it has been replaced since it was started.
fn program() -> PathBuf {
    match env::current_exe() {
        Ok(path) if path.exists() => path,
        _ => "mvm".into(),
    }
}

fn stanza(program: &Path, name: &str, user: &str) -> Result<String> {
    let odd = |c: char| c.is_control() || c.is_whitespace() || "\"'\\%#".contains(c);
    if user.is_empty() || user.contains(odd) {
        bail!("{user:?} is not the name of a user");
    }
    let Some(program) = program.to_str().filter(|path| !path.contains(['\n', '\0'])) else {
        bail!(
            "an SSH configuration cannot name {}: move mvm to another directory",
            program.display()
        );
    };
    // ssh replaces what begins with a percent sign, and has a shell run the result.
    let program = program.replace('\'', r"'\''").replace('%', "%%");
    Ok(format!(
        "\
# The connection never leaves this computer, and only its user reaches the machine's socket: host
# keys, which each new machine makes anew, would prove nothing and are neither checked nor kept.
Host mvm-{name}
    ProxyCommand '{program}' connect {name} %p
    User {user}
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    /// What ssh makes of `stanza`; None on a machine without it.
    fn understood(stanza: &str) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config");
        fs::write(&file, stanza).unwrap();
        let run = Command::new("ssh")
            .args(["-G", "-p", "2222", "mvm-box", "-F"])
            .arg(&file)
            .output();
        let output = match run {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                eprintln!("there is no ssh here: what it makes of the stanza is not tested");
                return None;
            }
            run => run.unwrap(),
        };
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        Some(String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn a_stanza_names_the_machine_the_program_and_the_user() {
        let stanza = stanza(Path::new("/opt/mvm/bin/mvm"), "box", "dev").unwrap();
        let lines: Vec<&str> = stanza.lines().map(str::trim).collect();
        assert!(lines.contains(&"Host mvm-box"));
        assert!(lines.contains(&"ProxyCommand '/opt/mvm/bin/mvm' connect box %p"));
        assert!(lines.contains(&"User dev"));
    }

    #[test]
    fn ssh_understands_it() {
        let stanza = stanza(Path::new("/opt/it's 100%/mvm"), "box", "dev").unwrap();
        let Some(understood) = understood(&stanza) else {
            return;
        };
        let lines: Vec<&str> = understood.lines().collect();
        assert!(lines.contains(&"user dev"), "{understood}");
        assert!(lines.contains(&"port 2222"), "{understood}");
        assert!(
            lines.contains(&"stricthostkeychecking false"),
            "{understood}"
        );
        let command = r"proxycommand '/opt/it'\''s 100%%/mvm' connect box %p";
        assert!(lines.contains(&command), "{understood}");
    }

    #[test]
    fn what_would_write_other_lines_is_refused() {
        for user in ["", "a b", "a\nProxyCommand x", "a\"", "#"] {
            assert!(stanza(Path::new("/mvm"), "box", user).is_err(), "{user:?}");
        }
        assert!(stanza(Path::new("/a\nb/mvm"), "box", "root").is_err());
    }
}
