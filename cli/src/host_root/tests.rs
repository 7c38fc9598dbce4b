//! What callers of all kinds get.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use share::Readers;
use tempfile::TempDir;

use super::*;

/// Somebody with a home of their own.
struct Person {
    dir: TempDir,
    caller: Caller,
}

impl Person {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let home = root.join("users/me");
        let cwd = home.join("project");
        fs::create_dir_all(&cwd).unwrap();
        let caller = Caller {
            uid: 1000,
            gid: 1000,
            name: Some("me".to_owned()),
            home,
            cwd,
            environment: Vec::new(),
        };
        Self { dir, caller }
    }

    fn home(&self, path: &str) -> PathBuf {
        self.caller.home.join(path)
    }

    /// Makes directories in the home.
    fn with(self, dirs: &[&str]) -> Self {
        for dir in dirs {
            fs::create_dir_all(self.home(dir)).unwrap();
        }
        self
    }

    fn variable(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.caller.environment.push((name.into(), value.into()));
        self
    }

    /// These directories of the home are in PATH.
    fn path(self, dirs: &[&str]) -> Self {
        let dirs = dirs.iter().map(|dir| self.home(dir));
        let path = std::env::join_paths([PathBuf::from("/usr/bin")].into_iter().chain(dirs));
        self.variable("PATH", path.unwrap())
    }

    fn root(&self) -> HostRoot {
        HostRoot::new(self.caller.clone(), &Asked::default()).unwrap()
    }

    /// What is shown of the home, from there on.
    fn shown(&self) -> Vec<(String, Access)> {
        shown(&self.root(), &self.caller.home)
    }
}

fn shown(root: &HostRoot, below: &Path) -> Vec<(String, Access)> {
    let mut shown: Vec<_> = root
        .exposed()
        .iter()
        .filter_map(|exposed| {
            let path = exposed.path.strip_prefix(below).ok()?;
            Some((path.to_str().unwrap().to_owned(), exposed.access))
        })
        .collect();
    shown.sort_by(|a, b| a.0.cmp(&b.0));
    shown
}

fn own(paths: &[&str]) -> Vec<(String, Access)> {
    let own = Access::Read(Readers::Owner);
    let mut expected: Vec<_> = paths.iter().map(|path| ((*path).to_owned(), own)).collect();
    expected.push(("project".to_owned(), Access::Write));
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    expected
}

#[test]
fn the_system_is_shown_as_everybody_sees_it() {
    let person = Person::new();
    let root = person.root();
    let access = |path: &str| {
        let exposed = root.exposed().iter().find(|e| e.path == Path::new(path));
        exposed.map(|exposed| exposed.access)
    };
    for path in ["/usr", "/etc"] {
        assert_eq!(access(path), Some(Access::Read(Readers::Everybody)));
    }
    for path in [
        "/", "/home", "/root", "/var", "/tmp", "/proc", "/dev", "/run", "/srv",
    ] {
        assert_eq!(access(path), None, "{path}");
    }
}

#[test]
fn a_home_is_absent_but_for_the_project() {
    let person = Person::new().with(&[".cargo/bin", ".rustup", "go/pkg", "documents"]);
    assert_eq!(person.shown(), own(&[]));
}

#[test]
fn toolchains_that_path_names_are_there() {
    let person = Person::new()
        .with(&[
            ".cargo/bin",
            ".rustup/toolchains",
            ".pyenv/shims",
            ".nvm/versions/node/v20/bin",
            ".local/bin",
            ".local/lib",
            ".local/share/keyrings",
            ".local/share/uv/tools",
            ".ssh",
        ])
        .path(&[
            ".cargo/bin",
            ".pyenv/shims",
            ".nvm/versions/node/v20/bin",
            ".local/bin",
        ]);
    let expected = own(&[
        ".cargo",
        ".rustup",
        ".pyenv",
        ".nvm",
        ".local/bin",
        ".local/lib",
        ".local/share/uv",
    ]);
    assert_eq!(person.shown(), expected);
}

#[test]
fn variables_name_toolchains_too() {
    let person = Person::new().with(&["venvs/x/bin", "elsewhere/cargo"]);
    let (venv, cargo) = (person.home("venvs/x"), person.home("elsewhere/cargo"));
    let person = person
        .variable("VIRTUAL_ENV", venv)
        .variable("CARGO_HOME", cargo);
    assert_eq!(person.shown(), own(&["venvs/x", "elsewhere/cargo"]));
}

#[test]
fn of_what_is_not_known_only_what_programs_need_is_shown() {
    let person = Person::new()
        .with(&[
            "tools/x/bin",
            "tools/x/lib",
            "tools/x/private",
            "bin",
            "lib",
        ])
        .path(&["tools/x/bin", "bin"]);
    assert_eq!(person.shown(), own(&["bin", "tools/x/bin", "tools/x/lib"]));
}

#[test]
fn a_home_is_not_shown_because_path_names_it() {
    let person = Person::new().with(&[".ssh", "x"]).path(&["", "..", ".ssh"]);
    assert_eq!(person.shown(), own(&[]));
    let root = person.root();
    assert_eq!(root.notes().count(), 3);
}

#[test]
fn a_link_to_a_home_is_no_way_into_it() {
    let person = Person::new();
    let link = person.dir.path().join("link");
    symlink(&person.caller.home, &link).unwrap();
    let person = person.variable("PATH", link.clone().into_os_string());
    let root = person.root();
    assert!(root.exposed().iter().all(|exposed| exposed.path != link));
    assert_eq!(person.shown(), own(&[]));
}

#[test]
fn a_toolchain_behind_a_link_is_there_with_the_link() {
    let person = Person::new().with(&[".nvm/versions/node/v20/bin"]);
    symlink("versions/node/v20", person.home(".nvm/current")).unwrap();
    let link = person.dir.path().join("node");
    symlink(person.home(".nvm/current/bin"), &link).unwrap();
    let person = person.variable("PATH", link.clone().into_os_string());
    let root = person.root();
    assert!(root.exposed().iter().any(|exposed| exposed.path == link));
    assert_eq!(person.shown(), own(&[".nvm"]));
}

#[test]
fn what_is_in_the_project_is_shared_with_it() {
    let person = Person::new()
        .with(&["project/.venv/bin"])
        .path(&["project/.venv/bin"]);
    assert_eq!(person.shown(), own(&[]));
}

#[test]
fn credentials_in_what_is_shown_are_listed_as_hidden() {
    let person = Person::new().with(&[".cargo/bin"]).path(&[".cargo/bin"]);
    fs::write(person.home(".cargo/credentials.toml"), "token").unwrap();
    let mut expected = own(&[".cargo"]);
    expected.insert(1, (".cargo/credentials.toml".to_owned(), Access::Hidden));
    assert_eq!(person.shown(), expected);
}

#[test]
fn paths_are_added_and_hidden() {
    let person = Person::new()
        .with(&["data/private", "data/public", ".cargo/bin", "out"])
        .path(&[".cargo/bin"]);
    let text = |paths: &[&str]| -> Vec<OsString> { paths.iter().map(OsString::from).collect() };
    let out = format!("{}:rw", person.home("out").display());
    let asked = Asked {
        show: &text(&["../data", &out]),
        hide: &text(&["../data/private", "../.cargo", "/opt"]),
        ..Asked::default()
    };
    let root = HostRoot::new(person.caller.clone(), &asked).unwrap();
    let expected = [
        (".cargo", Access::Hidden),
        ("data", Access::Read(Readers::Process)),
        ("data/private", Access::Hidden),
        ("out", Access::Write),
        ("project", Access::Write),
    ]
    .map(|(path, access)| (path.to_owned(), access));
    assert_eq!(shown(&root, &person.caller.home), expected);
    let writable: Vec<_> = root.writable().collect();
    assert_eq!(writable, [person.home("out"), person.home("project")]);
    let opt: Vec<_> = shown(&root, Path::new("/opt"));
    assert_eq!(opt, [(String::new(), Access::Hidden)]);
}

#[test]
fn what_cannot_be_shown_is_refused() {
    let person = Person::new();
    for path in [
        "/",
        "/..",
        "/proc",
        "/proc/1/root",
        "/dev:rw",
        "no/such/thing",
        "/sys:ro",
    ] {
        let show = [OsString::from(path)];
        let asked = Asked {
            show: &show,
            ..Asked::default()
        };
        assert!(
            HostRoot::new(person.caller.clone(), &asked).is_err(),
            "{path}"
        );
    }
    let asked = Asked {
        hide: &["/".into()],
        ..Asked::default()
    };
    assert!(HostRoot::new(person.caller.clone(), &asked).is_err());
}

#[test]
fn some_working_directories_are_not_shared_without_a_word() {
    let person = Person::new().with(&[".ssh/keys", ".config/nvim"]);
    let home = person.caller.home.clone();
    let above = home.parent().unwrap().to_owned();
    let keys = person.home(".ssh/keys");
    let dirs = [
        "/",
        "/tmp",
        "/usr",
        "/usr/share/doc",
        "/etc",
        "/proc",
        "/home",
        "/home/you",
        "/var/lib",
    ];
    let never = dirs.iter().map(PathBuf::from).chain([home, above, keys]);
    for cwd in never {
        let caller = Caller {
            cwd: cwd.clone(),
            ..person.caller.clone()
        };
        let root = HostRoot::new(caller, &Asked::default()).unwrap();
        assert_eq!(root.writable().count(), 0, "{}", cwd.display());
        assert!(root.unshared().is_some(), "{}", cwd.display());
    }
    let always = [
        "/work",
        "/usr/src/app",
        "/opt/project",
        "/srv/site",
        "/home/you/project",
        "/var/lib/x/y",
    ];
    let always = always.iter().map(PathBuf::from);
    for cwd in always.chain([person.home(".config/nvim")]) {
        let caller = Caller {
            cwd: cwd.clone(),
            ..person.caller.clone()
        };
        let root = HostRoot::new(caller, &Asked::default()).unwrap();
        assert_eq!(root.writable().collect::<Vec<_>>(), [cwd]);
        assert_eq!(root.notes().count(), 0);
    }
}

#[test]
fn what_is_decided_of_the_working_directory_is_not_decided_again() {
    let person = Person::new();
    let project = person.caller.cwd.clone();
    let hide = [project.clone().into_os_string()];
    let mounted = [project];
    for asked in [
        Asked {
            hide: &hide,
            ..Asked::default()
        },
        Asked {
            mounted: &mounted,
            ..Asked::default()
        },
    ] {
        let root = HostRoot::new(person.caller.clone(), &asked).unwrap();
        assert_eq!(root.writable().count(), 0, "{asked:?}");
        assert_eq!(root.notes().count(), 0);
    }
}

#[test]
fn the_command_has_the_callers_name_home_and_path() {
    let person = Person::new()
        .variable("PATH", "/usr/bin:relative:/usr/local/bin")
        .variable("LANG", "C.UTF-8");
    let root = person.root();
    assert_eq!(root.user(), "me");
    let environment = root.environment(None);
    let value = |name: &str| {
        let found = environment
            .iter()
            .find(|(known, _)| known == name.as_bytes());
        String::from_utf8(found.unwrap().1.clone()).unwrap()
    };
    assert_eq!(value("HOME"), person.caller.home.to_str().unwrap());
    assert_eq!(value("PATH"), "/usr/bin:relative:/usr/local/bin");
    assert_eq!(value("LANG"), "C.UTF-8");
    for (user, is_there) in [("me", true), ("1000", true), ("root", false)] {
        let variables = root.environment(Some(user));
        let has_home = variables.iter().any(|(name, _)| name == b"HOME");
        assert_eq!(has_home, is_there, "{user}");
    }
    let nameless = Caller {
        name: None,
        ..person.caller.clone()
    };
    let root = HostRoot::new(nameless, &Asked::default()).unwrap();
    assert_eq!(root.user(), "1000:1000");
}
