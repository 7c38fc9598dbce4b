//! The verbs for machines that exist: what was typed after their names.

use std::ffi::OsString;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand, ValueEnum};

use super::Format;
use super::folder::MountCommand;
use crate::forward::spec::{PortRange, Publish};
use crate::store::Name;

/// What is done with machines that exist.
#[derive(Debug, Subcommand)]
pub enum MachineCommand {
    /// List the machines that run
    #[command(visible_alias = "ls")]
    Ps {
        /// Also those that have ended
        #[arg(short, long)]
        all: bool,
        /// How to print the list
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Run a command in a running machine, and exit with its exit code
    Exec(ExecArgs),
    /// Open a shell in a running machine, in the same directory where the machine has it
    Shell(ShellArgs),
    /// Show what a machine's command printed
    Logs(LogsArgs),
    /// End machines in an orderly way
    Stop {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        /// Use force after so many seconds
        #[arg(short, long, value_name = "SECONDS", default_value = "10")]
        timeout: u32,
    },
    /// Send a signal to machines' commands; SIGKILL ends the machines themselves
    Kill {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        /// Its name or number
        #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = parse_signal)]
        signal: i32,
    },
    /// Wait until machines have ended, and print their exit codes
    Wait {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
    },
    /// Start machines again that have ended
    Start {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
    },
    /// End machines and start them again
    Restart {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        /// Use force after so many seconds
        #[arg(short, long, value_name = "SECONDS", default_value = "10")]
        timeout: u32,
    },
    /// Remove machines that have ended, and all that is kept of them
    Rm {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        /// End those that run
        #[arg(short, long)]
        force: bool,
    },
    /// Show all that is known of machines
    Inspect {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        /// How to print it
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Show what machines use, once a second
    Stats {
        /// Machines [default: all that run]
        #[arg(value_name = "NAME")]
        names: Vec<Name>,
        /// Show it once
        #[arg(long)]
        no_stream: bool,
        /// How to print it
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Give a machine another name
    Rename {
        /// The machine
        #[arg(value_name = "NAME")]
        from: Name,
        /// Its name from now on
        #[arg(value_name = "NEW_NAME")]
        to: Name,
    },
    /// Stop machines' CPUs
    Pause {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
    },
    /// Let machines' CPUs go on
    Resume {
        /// Machines
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
    },
    /// Publish ports of a running machine
    #[command(subcommand)]
    Port(PortCommand),
    /// Share folders with a running machine
    #[command(subcommand)]
    Mount(MountCommand),
    /// Connect standard input and output to a port of the machine, for an SSH client's ProxyCommand
    Connect {
        /// The machine
        name: Name,
        /// The port, of the machine's own loopback
        #[arg(value_parser = clap::value_parser!(u16).range(1..))]
        port: u16,
    },
    /// Print what an SSH client needs to know of a machine, for its configuration file
    SshConfig {
        /// The machine
        name: Name,
        /// Who logs in
        #[arg(short, long, default_value = "root")]
        user: String,
    },
}

/// `mvm exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code: the command's own; 128+N when signal N killed it; 125 when mvm or the machine failed; \
126 when the command cannot be executed; 127 when it is not found; 2 for a wrong command line.")]
pub struct ExecArgs {
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,

    /// Run the command on a terminal
    #[arg(short, long)]
    pub tty: bool,

    /// Set an environment variable of the command; without a value, pass on the caller's
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<OsString>,

    /// Working directory of the command in the guest
    #[arg(short, long, value_name = "DIR", value_parser = super::parse_workdir)]
    pub workdir: Option<OsString>,

    /// User (name or number, optionally `:group`) that the command runs as
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// The machine
    pub name: Name,

    /// The command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub command: Vec<OsString>,
}

/// `mvm shell`.
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// User (name or number, optionally `:group`) whose shell it is
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// Start in this directory of the guest
    #[arg(short, long, value_name = "DIR", value_parser = super::parse_workdir)]
    pub workdir: Option<OsString>,

    /// The machine
    pub name: Name,
}

/// `mvm logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the machine ends
    #[arg(short, long)]
    pub follow: bool,

    /// Show what came out of the machine's serial port instead
    #[arg(long)]
    pub console: bool,

    /// Only what was printed since then: a time (2026-01-31T12:00:00Z) or so long ago (10m)
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    pub since: Option<SystemTime>,

    /// The machine
    pub name: Name,
}

/// `mvm port`.
#[derive(Debug, Subcommand)]
pub enum PortCommand {
    /// Publish ports; one without HOST gets a free port of the host, which is printed
    Add {
        /// The machine
        name: Name,
        /// Ports, ranges or Unix sockets
        #[arg(required = true, value_name = "[[IP:]HOST:]GUEST[/udp]")]
        ports: Vec<Publish>,
    },
    /// Publish ports no longer; connections that run go on
    Rm {
        /// The machine
        name: Name,
        /// Ports, as they were published or of the guest alone
        #[arg(required = true, value_name = "[[IP:]HOST:]GUEST[/udp]")]
        ports: Vec<Publish>,
    },
    /// List what is forwarded, either way
    Ls {
        /// The machine
        name: Name,
        /// How to print the list
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Publish every port on which a program in the guest listens, or say whether that is so
    Auto {
        /// The machine
        name: Name,
        /// Whether to
        #[arg(value_enum)]
        on: Option<Switch>,
        /// Leave these ports of the guest out
        #[arg(long, value_name = "PORT[-PORT]", value_delimiter = ',')]
        exclude: Option<Vec<PortRange>>,
    },
}

/// Whether something is to be so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It is
    On,
    /// It is not
    Off,
}

/// Linux's signals for x86-64 and most other architectures, by name.
const SIGNALS: &[(&str, i32)] = &[
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

/// The highest number of a signal.
const LAST_SIGNAL: i32 = 64;

fn parse_signal(text: &str) -> Result<i32, String> {
    if let Ok(number) = text.parse() {
        return match number {
            1..=LAST_SIGNAL => Ok(number),
            _ => Err(format!("a signal's number is 1 to {LAST_SIGNAL}")),
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    SIGNALS
        .iter()
        .find_map(|(known, number)| (*known == name).then_some(*number))
        .ok_or_else(|| "that is no signal: write TERM, SIGTERM or 15".to_owned())
}

fn parse_since(text: &str) -> Result<SystemTime, String> {
    if let Ok(ago) = humantime::parse_duration(text) {
        return Ok(before_now(ago));
    }
    humantime::parse_rfc3339_weak(text).map_err(|_| {
        "write a time such as 2026-01-31T12:00:00Z, or how long ago, such as 10m".to_owned()
    })
}

fn before_now(ago: Duration) -> SystemTime {
    SystemTime::now()
        .checked_sub(ago)
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn parse(words: &[&str]) -> Result<MachineCommand, clap::Error> {
        let words = ["mvm"].iter().chain(words);
        Cli::try_parse_from(words).map(|cli| match cli.command {
            Command::Machine(command) => command,
            other => panic!("parsed as {other:?}"),
        })
    }

    fn exec(words: &[&str]) -> ExecArgs {
        match parse(words) {
            Ok(MachineCommand::Exec(args)) => args,
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn what_follows_the_machine_is_the_command() {
        for words in [
            &["exec", "-it", "web", "--", "ls", "-l", "--", "-t"][..],
            &["exec", "-it", "web", "ls", "-l", "--", "-t"],
        ] {
            let args = exec(words);
            assert_eq!(args.command, ["ls", "-l", "--", "-t"], "{words:?}");
            assert!(args.interactive && args.tty);
            assert_eq!(args.name.as_str(), "web");
        }
        assert!(parse(&["exec", "web"]).is_err());
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(parse_signal(text), Ok(15));
        }
        for bad in ["", "0", "65", "-9", "SIG", "NOPE", "SIGSIGTERM"] {
            assert!(parse_signal(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn a_time_is_a_moment_or_a_while_ago() {
        let moment = parse_since("2018-02-14T00:28:07Z").unwrap();
        let epoch = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(epoch.as_secs(), 1_518_568_087);
        assert!(parse_since("10m").unwrap() < SystemTime::now());
        assert!(parse_since("1000000000y").is_ok_and(|time| time < SystemTime::now()));
        for bad in ["", "yesterday", "2018", "10"] {
            assert!(parse_since(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn wrong_names_are_usage_errors_for_every_verb() {
        let long = "n".repeat(300);
        for name in ["a/b", "../x", "", ".", &long] {
            for verb in [
                &["exec", name, "ls"][..],
                &["shell", name],
                &["logs", name],
                &["stop", name],
                &["kill", name],
                &["wait", "fine", name],
                &["start", name],
                &["restart", name],
                &["rm", "-f", name],
                &["inspect", name],
                &["stats", name],
                &["rename", "fine", name],
                &["pause", name],
                &["resume", name],
                &["port", "add", name, "80"],
                &["port", "rm", name, "80"],
                &["port", "ls", name],
                &["port", "auto", name],
                &["mount", "add", name, ".:/project"],
                &["mount", "rm", name, "/project"],
                &["mount", "ls", name],
            ] {
                let error = parse(verb).unwrap_err();
                assert_eq!(error.exit_code(), 2, "{verb:?}");
            }
        }
        for bad in [
            &["stop"][..],
            &["port", "add", "web"],
            &["port", "add", "web", "70000"],
            &["port", "add", "web", "0"],
            &["port", "auto", "web", "perhaps"],
            &["mount", "add", "web"],
            &["mount", "add", "web", "."],
            &["mount", "add", "web", ".:work"],
            &["mount", "rm", "web", "work"],
            &["mount", "rm", "web"],
            &["stop", "-t", "-1", "web"],
            &["kill", "-s", "NOPE", "web"],
        ] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }
}
