//! What of the host is shown, put together: the system, what PATH and other variables name, what was
//! asked for.

use std::fs;
use std::path::{Path, PathBuf};

use share::Readers;

use super::caller::Caller;
use super::paths::{self, is_below_any, is_guests_own, is_wide, real};
use super::{Access, Exposed, known};

/// What is shown so far.
#[derive(Debug)]
pub struct Gathering<'a> {
    caller: &'a Caller,
    /// The home without symbolic links.
    home: PathBuf,
    pub exposed: Vec<Exposed>,
    /// What is to be said to the caller.
    pub notes: Vec<String>,
}

impl<'a> Gathering<'a> {
    /// What of the host is shown by itself; `project` is shared apart from it.
    pub fn new(caller: &'a Caller, project: Option<&Path>) -> Self {
        let mut gathering = Self {
            caller,
            home: real(&caller.home),
            exposed: Vec::new(),
            notes: Vec::new(),
        };
        for dir in known::SYSTEM.iter().chain(known::VAR) {
            gathering.add(Path::new(dir), Access::Read(Readers::Everybody), "system");
        }
        for dir in caller.search_path() {
            gathering.add_named(&dir, "PATH", project);
        }
        for name in known::DIRECTORY_VARIABLES {
            if let Some(value) = caller.variable(name) {
                gathering.add_named(Path::new(value), name, project);
            }
        }
        for (program, dirs) in known::COMPANIONS {
            if caller.search_path().any(|dir| dir.join(program).exists()) {
                for dir in *dirs {
                    let why = format!("belongs to {program}");
                    gathering.add_own(&caller.home.join(dir), &why);
                }
            }
        }
        gathering.hide_known();
        gathering
    }

    /// Whether what is shown takes `path` in.
    pub fn shows(&self, path: &Path) -> bool {
        self.exposed.iter().any(|exposed| {
            matches!(exposed.access, Access::Read(_)) && path.starts_with(&exposed.path)
        })
    }

    /// Adds a path that exists, unless it is shown anyway.
    fn add(&mut self, path: &Path, access: Access, why: &str) {
        if fs::symlink_metadata(path).is_ok() && !self.shows(path) {
            self.exposed.push(Exposed::new(path, access, why));
        }
    }

    fn add_own(&mut self, path: &Path, why: &str) {
        self.add(path, Access::Read(Readers::Owner), why);
    }

    /// Adds a directory that `variable` names, and the toolchain that it belongs to.
    fn add_named(&mut self, dir: &Path, variable: &str, project: Option<&Path>) {
        let target = real(dir);
        let is_projects = project.is_some_and(|project| target.starts_with(project));
        if !dir.is_absolute() || !target.is_dir() || is_projects || is_guests_own(&target) {
            return;
        }
        let is_secret = |path: &Path| {
            let path = self.in_home(path);
            path.is_some_and(|path| is_below_any(path, known::CREDENTIALS))
        };
        if is_wide(&target, &self.home) || is_secret(dir) || is_secret(&target) {
            self.notes.push(format!(
                "{} is not shown, although {variable} names it: `--host-path` shows it",
                dir.display()
            ));
            return;
        }
        for path in [dir, &target] {
            if !self.shows(path) && !is_guests_own(path) {
                self.add_toolchain(path, &format!("{variable} names {}", dir.display()));
            }
        }
    }

    /// The path from the caller's home on, where it is in there.
    fn in_home<'p>(&self, path: &'p Path) -> Option<&'p Path> {
        let typed = path.strip_prefix(&self.caller.home);
        typed.or_else(|_| path.strip_prefix(&self.home)).ok()
    }

    fn add_toolchain(&mut self, dir: &Path, why: &str) {
        let Some(from_home) = self.in_home(dir) else {
            return self.add_prefix(dir, Access::Read(Readers::Everybody), why);
        };
        let fitting = known::TOOLCHAINS
            .iter()
            .filter(|toolchain| from_home.starts_with(toolchain.at));
        let longest = fitting.max_by_key(|toolchain| toolchain.at.len());
        let Some(toolchain) = longest else {
            return self.add_prefix(dir, Access::Read(Readers::Owner), why);
        };
        for path in toolchain.shown {
            self.add_own(&self.caller.home.join(path), why);
        }
        // The directory itself, where it is not where such toolchains have theirs.
        self.add_own(&self.caller.home.join(from_home), why);
    }

    /// A directory of which nothing is known, and where it is a `bin`, what is beside it.
    fn add_prefix(&mut self, dir: &Path, access: Access, why: &str) {
        self.add(dir, access, why);
        let is_bin = dir.file_name().is_some_and(|name| name == "bin");
        let Some(prefix) = dir.parent().filter(|_| is_bin) else {
            return;
        };
        if is_wide(&real(prefix), &self.home) {
            return;
        }
        for name in known::BESIDE_BIN {
            self.add(&prefix.join(name), access, why);
        }
    }

    /// Hides what is known to be secret; what of that is there and would be shown is listed.
    fn hide_known(&mut self) {
        let secrets = known::SYSTEM_SECRETS.iter().map(PathBuf::from).chain(
            known::CREDENTIALS
                .iter()
                .map(|path| self.caller.home.join(path)),
        );
        let there: Vec<_> = secrets
            .filter(|path| fs::symlink_metadata(path).is_ok() && self.shows(path))
            .map(|path| Exposed::new(&path, Access::Hidden, "secret"))
            .collect();
        self.exposed.extend(there);
    }

    /// Hides `path` and all in it.
    pub fn hide(&mut self, path: &Path, why: &str) {
        let target = real(path);
        for path in [path, &target] {
            self.exposed
                .retain(|exposed| !exposed.path.starts_with(path));
        }
        self.exposed.push(Exposed::new(path, Access::Hidden, why));
    }

    /// Shows `path` and all in it that the caller may read.
    pub fn show(&mut self, path: &Path, why: &str) {
        let access = Access::Read(Readers::Process);
        self.exposed.push(Exposed::new(path, access, why));
    }
}

/// The directories where credentials are.
pub fn secrets(caller: &Caller) -> Vec<PathBuf> {
    let homes = [caller.home.clone(), paths::real(&caller.home)];
    let in_homes = homes
        .iter()
        .flat_map(|home| known::CREDENTIALS.iter().map(|path| home.join(path)));
    let system = known::SYSTEM_SECRETS.iter().map(PathBuf::from);
    in_homes.chain(system).collect()
}
