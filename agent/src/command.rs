//! What to execute: an [`Exec`] request turned into the strings that execve(2) takes.

use std::ffi::CString;

use agent::protocol::{Exec, Refusal};

use crate::users::User;

const ROOT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const USER_PATH: &[u8] = b"/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";

/// Why a command does not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// What kind of failure, for the exit code.
    pub reason: Refusal,
    /// One sentence.
    pub message: String,
}

impl Refused {
    /// A refusal that has nothing to do with the program itself.
    pub fn other(message: impl Into<String>) -> Self {
        Self {
            reason: Refusal::Other,
            message: message.into(),
        }
    }
}

/// A command that only has to be executed, all its strings terminated as execve(2) wants them.
#[derive(Debug)]
pub struct Command {
    /// The program as it was asked for.
    pub program: String,
    /// Paths to try, in this order, until one exists.
    pub candidates: Vec<CString>,
    /// Arguments, the program's name first.
    pub argv: Vec<CString>,
    /// `NAME=VALUE` strings.
    pub envp: Vec<CString>,
    /// Working directories to try, in this order.
    pub directories: Vec<CString>,
    /// Who it runs as.
    pub user: User,
}

impl Command {
    /// Works out what `exec` asks to run for `user`.
    pub fn new(exec: &Exec, user: User) -> Result<Self, Refused> {
        let env = environment(exec, &user)?;
        let (program, argv) = match exec.argv.first() {
            Some(program) => (program.clone(), terminated(&exec.argv, "an argument")?),
            None => (user.shell.clone(), vec![login_name(&user.shell)?]),
        };
        let path = env.iter().find(|(name, _)| name == b"PATH");
        let candidates = candidates(&program, path.map_or(&b""[..], |(_, value)| value))?;
        let envp = env
            .iter()
            .map(|(name, value)| c_string(&[name, &b"="[..], value].concat(), "the environment"))
            .collect::<Result<_, _>>()?;
        let mut directories = Vec::new();
        match &exec.cwd {
            Some(directory) if !directory.starts_with(b"/") => {
                return Err(Refused::other(format!(
                    "the working directory {} is not an absolute path",
                    String::from_utf8_lossy(directory)
                )));
            }
            Some(directory) => directories.push(c_string(directory, "the working directory")?),
            None => {}
        }
        if exec.cwd.is_none() || exec.cwd_or_home {
            directories.push(c_string(&user.home, "the home directory")?);
            directories.push(c"/".to_owned());
        }
        Ok(Self {
            program: String::from_utf8_lossy(&program).into_owned(),
            candidates,
            argv,
            envp,
            directories,
            user,
        })
    }
}

/// Name and value of an environment variable.
type Variable = (Vec<u8>, Vec<u8>);

/// The base environment of login(1) with the request's own variables over it.
fn environment(exec: &Exec, user: &User) -> Result<Vec<Variable>, Refused> {
    let mut env: Vec<Variable> = Vec::new();
    let mut set = |name: &[u8], value: &[u8]| match env.iter_mut().find(|(known, _)| known == name)
    {
        Some(variable) => variable.1 = value.to_vec(),
        None => env.push((name.to_vec(), value.to_vec())),
    };
    if !exec.clear_env {
        set(b"PATH", if user.uid == 0 { ROOT_PATH } else { USER_PATH });
        set(b"HOME", &user.home);
        set(b"SHELL", &user.shell);
        if let Some(name) = &user.name {
            set(b"USER", name);
            set(b"LOGNAME", name);
        }
        if exec.terminal.is_some() {
            set(b"TERM", b"xterm");
        }
    }
    for (name, value) in &exec.env {
        if name.is_empty() || name.contains(&b'=') {
            return Err(Refused::other(format!(
                "{:?} cannot be the name of an environment variable",
                String::from_utf8_lossy(name)
            )));
        }
        set(name, value);
    }
    Ok(env)
}

/// What execvp(3) would try: the program itself where it has a slash, else each directory of PATH.
fn candidates(program: &[u8], path: &[u8]) -> Result<Vec<CString>, Refused> {
    if program.is_empty() {
        return Ok(Vec::new());
    }
    if program.contains(&b'/') {
        return Ok(vec![c_string(program, "the program's name")?]);
    }
    path.split(|&b| b == b':')
        .map(|directory| match directory {
            // An empty element means the working directory (POSIX, 8.3).
            b"" => c_string(&[b"./", program].concat(), "the program's name"),
            _ => c_string(&[directory, b"/", program].concat(), "the program's name"),
        })
        .collect()
}

/// The first argument that tells a shell to be a login shell: `-sh` for `/bin/sh`.
fn login_name(shell: &[u8]) -> Result<CString, Refused> {
    let name = shell.rsplit(|&b| b == b'/').next().unwrap_or(shell);
    c_string(&[b"-", name].concat(), "the login shell")
}

fn terminated(strings: &[Vec<u8>], what: &str) -> Result<Vec<CString>, Refused> {
    strings
        .iter()
        .map(|string| c_string(string, what))
        .collect()
}

fn c_string(bytes: &[u8], what: &str) -> Result<CString, Refused> {
    CString::new(bytes).map_err(|_| {
        Refused::other(format!(
            "{what} contains a NUL byte, which Linux cannot pass on"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::users;
    use agent::protocol::WindowSize;

    fn exec(argv: &[&str]) -> Exec {
        Exec {
            session: 1,
            argv: argv
                .iter()
                .map(|argument| argument.as_bytes().to_vec())
                .collect(),
            env: Vec::new(),
            clear_env: false,
            cwd: None,
            cwd_or_home: false,
            user: None,
            terminal: None,
            stdin: false,
            in_initramfs: false,
        }
    }

    fn root() -> User {
        users::resolve(None, b"root:x:0:0::/root:/usr/bin/fish\n", b"").unwrap()
    }

    fn texts(strings: &[CString]) -> Vec<&str> {
        strings
            .iter()
            .map(|string| string.to_str().unwrap())
            .collect()
    }

    #[test]
    fn a_program_without_a_slash_is_looked_up_in_the_requests_own_path() {
        let mut exec = exec(&["ls", "-l"]);
        exec.env = vec![(b"PATH".to_vec(), b"/opt/bin::/bin".to_vec())];
        let command = Command::new(&exec, root()).unwrap();
        assert_eq!(
            texts(&command.candidates),
            ["/opt/bin/ls", "./ls", "/bin/ls"]
        );
        assert_eq!(texts(&command.argv), ["ls", "-l"]);
    }

    #[test]
    fn a_program_with_a_slash_is_taken_as_it_is() {
        let command = Command::new(&exec(&["./run"]), root()).unwrap();
        assert_eq!(texts(&command.candidates), ["./run"]);
    }

    #[test]
    fn an_empty_request_is_the_users_login_shell() {
        let command = Command::new(&exec(&[]), root()).unwrap();
        assert_eq!(texts(&command.candidates), ["/usr/bin/fish"]);
        assert_eq!(texts(&command.argv), ["-fish"]);
    }

    #[test]
    fn the_base_environment_has_term_only_with_a_terminal() {
        let mut exec = exec(&["env"]);
        let without = Command::new(&exec, root()).unwrap();
        exec.terminal = Some(WindowSize { rows: 1, cols: 1 });
        exec.env = vec![(b"HOME".to_vec(), b"/elsewhere".to_vec())];
        let with = Command::new(&exec, root()).unwrap();
        assert!(
            !texts(&without.envp)
                .iter()
                .any(|variable| variable.starts_with("TERM="))
        );
        assert!(texts(&with.envp).contains(&"TERM=xterm"));
        assert!(texts(&with.envp).contains(&"HOME=/elsewhere"));
        assert!(texts(&with.envp).contains(&"USER=root"));
    }

    #[test]
    fn a_cleared_environment_holds_what_was_asked_for_and_nothing_else() {
        let mut exec = exec(&["env"]);
        exec.clear_env = true;
        exec.env = vec![
            (b"A".to_vec(), b"1".to_vec()),
            (b"A".to_vec(), b"2".to_vec()),
        ];
        assert_eq!(texts(&Command::new(&exec, root()).unwrap().envp), ["A=2"]);
    }

    #[test]
    fn what_execve_cannot_pass_on_is_refused() {
        let mut nul = exec(&["a\0b"]);
        assert_eq!(
            Command::new(&nul, root()).unwrap_err().reason,
            Refusal::Other
        );
        nul.argv = vec![b"a".to_vec()];
        nul.env = vec![(b"A=B".to_vec(), b"".to_vec())];
        assert_eq!(
            Command::new(&nul, root()).unwrap_err().reason,
            Refusal::Other
        );
        nul.env.clear();
        nul.cwd = Some(b"relative".to_vec());
        assert_eq!(
            Command::new(&nul, root()).unwrap_err().reason,
            Refusal::Other
        );
    }
}
