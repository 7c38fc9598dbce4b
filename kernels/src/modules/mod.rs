//! Kernel modules: which files a kernel needs for a feature, in the order to load them.
//!
//! A module tree is what `/lib/modules/VERSION` is: the modules, `modules.dep` (which module
//! needs which), `modules.builtin` (what the kernel has in itself), `modules.alias` and
//! `modules.softdep`. A distribution's package comes without most of these, because `depmod`
//! writes them at installation; [`index`] does that here.

mod depmod;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

use crate::cache::{Cache, CacheError};

pub use depmod::index;

/// The largest module that is read, in bytes once unpacked.
const MAX_MODULE: u64 = 256 << 20;
/// The largest index file that is read, in bytes. A large distribution's aliases are 2 MiB.
const MAX_INDEX: u64 = 64 << 20;
const DEPENDENCIES: &str = "modules.dep";
const SUFFIXES: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];

/// Why modules could not be found or read.
#[derive(Debug, Error)]
pub enum ModulesError {
    /// A file of the tree could not be used.
    #[error("reading {path} failed")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There are no modules in the directory.
    #[error("{0} is no module tree: it holds no modules.dep and no modules")]
    NotATree(PathBuf),
    /// Modules are neither there nor built in.
    #[error("the kernel has no {names} (looked in {tree})")]
    Missing {
        /// The modules.
        names: String,
        /// The tree.
        tree: PathBuf,
    },
    /// A module is larger than any real one.
    #[error("the module {0} is too large")]
    TooLarge(PathBuf),
    /// There is no place for indexes.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl ModulesError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// One module to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, as `lsmod` prints it.
    pub name: String,
    /// Its file, which may be compressed.
    pub path: PathBuf,
    /// Whether what was asked for depends on it. One that is not required may fail to load: it
    /// makes another faster, or fits a CPU that this is not.
    pub required: bool,
}

impl Module {
    /// The module as `init_module` takes it: an uncompressed ELF object.
    ///
    /// # Errors
    /// When the file cannot be read or unpacked, or is larger than any module.
    pub fn read(&self) -> Result<Vec<u8>, ModulesError> {
        read_module(&self.path)
    }
}

/// The modules of one kernel.
#[derive(Debug, Clone)]
pub struct ModuleTree {
    dir: PathBuf,
    /// Where `modules.dep`, `.alias` and `.softdep` are: in `dir`, or in the cache for a tree that
    /// comes without.
    index: PathBuf,
    /// Name → file below `dir` and the names of what has to be loaded before.
    modules: HashMap<String, Entry>,
    builtin: HashSet<String>,
}

#[derive(Debug, Clone)]
struct Entry {
    path: PathBuf,
    needs: Vec<String>,
}

impl ModuleTree {
    /// Opens the module tree in `dir`, which has its indexes, as every installed one has.
    ///
    /// # Errors
    /// When `dir` has no `modules.dep`, or cannot be read.
    pub fn open(dir: &Path) -> Result<Self, ModulesError> {
        Self::with_index(dir, dir)
    }

    /// Opens the module tree in `dir`. The indexes of one that comes without, as in an unpacked
    /// package, are made once and kept in `cache`.
    ///
    /// # Errors
    /// When there are no modules in `dir`, or it cannot be read.
    pub fn open_indexed(cache: &Cache, dir: &Path) -> Result<Self, ModulesError> {
        if dir.join(DEPENDENCIES).is_file() {
            Self::open(dir)
        } else {
            Self::with_index(dir, &cached_index(cache, dir)?)
        }
    }

    fn with_index(dir: &Path, index: &Path) -> Result<Self, ModulesError> {
        let dependencies = read_index(index, DEPENDENCIES)?
            .ok_or_else(|| ModulesError::NotATree(dir.to_owned()))?;
        let builtin = read_index(dir, "modules.builtin")?
            .unwrap_or_default()
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        Ok(Self {
            dir: dir.to_owned(),
            index: index.to_owned(),
            modules: parse_dependencies(&dependencies),
            builtin,
        })
    }

    /// The directory that this was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the tree has the module, or the kernel has it built in.
    pub fn has(&self, name: &str) -> bool {
        let name = canonical(name);
        self.modules.contains_key(&name) || self.builtin.contains(&name)
    }

    /// The modules to load for `required` and, as far as they are there, for `optional`, each
    /// after what it depends on. Names may be aliases; what is built in is passed over.
    ///
    /// # Errors
    /// When one of `required` is neither there nor built in, or an index cannot be read.
    pub fn resolve(
        &self,
        required: &[&str],
        optional: &[&str],
    ) -> Result<Vec<Module>, ModulesError> {
        let mut resolution = Resolution {
            tree: self,
            aliases: None,
            soft: parse_soft(&read_index(&self.index, "modules.softdep")?.unwrap_or_default()),
            order: Vec::new(),
            state: HashMap::new(),
        };
        let mut missing = BTreeSet::new();
        for name in required {
            if !resolution.add(name, true)? {
                missing.insert(*name);
            }
        }
        if !missing.is_empty() {
            return Err(ModulesError::Missing {
                names: missing.into_iter().collect::<Vec<_>>().join(", "),
                tree: self.dir.clone(),
            });
        }
        for name in optional {
            resolution.add(name, false)?;
        }
        Ok(resolution.finish())
    }
}

/// One walk through the dependencies.
struct Resolution<'a> {
    tree: &'a ModuleTree,
    /// Read when a name is met that is no module's.
    aliases: Option<HashMap<String, Vec<String>>>,
    soft: HashMap<String, Vec<String>>,
    order: Vec<String>,
    /// Names met so far, and whether something required depends on them.
    state: HashMap<String, bool>,
}

impl Resolution<'_> {
    /// Adds a module, or what an alias stands for; false where there is nothing of that name.
    fn add(&mut self, name: &str, required: bool) -> Result<bool, ModulesError> {
        let name = canonical(name);
        if self.tree.modules.contains_key(&name) {
            self.add_module(&name, required)?;
            return Ok(true);
        }
        if self.tree.builtin.contains(&name) {
            return Ok(true);
        }
        let targets = self.alias(&name)?;
        // Of several drivers behind one alias it is enough that one loads.
        let required = required && targets.len() == 1;
        for target in &targets {
            self.add_module(target, required)?;
        }
        Ok(!targets.is_empty())
    }

    fn alias(&mut self, name: &str) -> Result<Vec<String>, ModulesError> {
        let aliases = match self.aliases.take() {
            Some(aliases) => aliases,
            None => {
                parse_aliases(&read_index(&self.tree.index, "modules.alias")?.unwrap_or_default())
            }
        };
        let targets = aliases.get(name).cloned().unwrap_or_default();
        self.aliases = Some(aliases);
        Ok(targets
            .into_iter()
            .filter(|target| self.tree.modules.contains_key(target))
            .collect())
    }

    /// Adds a module of the tree after all that it needs. Not recursive: a damaged index could
    /// chain thousands of modules.
    fn add_module(&mut self, name: &str, required: bool) -> Result<(), ModulesError> {
        enum Step {
            Enter(String, bool),
            Leave(String),
        }
        let mut work = vec![Step::Enter(name.to_owned(), required)];
        while let Some(step) = work.pop() {
            let (name, required) = match step {
                Step::Leave(name) => {
                    self.order.push(name);
                    continue;
                }
                Step::Enter(name, required) => (name, required),
            };
            let Some(entry) = self.tree.modules.get(&name) else {
                continue;
            };
            match self.state.get(&name) {
                // Met before; what it needs may have become required.
                Some(&known) if known || !required => continue,
                Some(_) => {}
                None => work.push(Step::Leave(name.clone())),
            }
            self.state.insert(name.clone(), required);
            // The last that is pushed is taken first: soft dependencies come before hard ones.
            work.extend(
                entry
                    .needs
                    .iter()
                    .map(|need| Step::Enter(need.clone(), required)),
            );
            for soft in self.soft.get(&name).cloned().unwrap_or_default() {
                let targets = if self.tree.modules.contains_key(&soft) {
                    vec![soft]
                } else {
                    self.alias(&soft)?
                };
                work.extend(targets.into_iter().map(|target| Step::Enter(target, false)));
            }
        }
        Ok(())
    }

    fn finish(self) -> Vec<Module> {
        self.order
            .iter()
            .filter_map(|name| {
                Some(Module {
                    path: self.tree.dir.join(&self.tree.modules.get(name)?.path),
                    required: self.state.get(name).copied().unwrap_or(false),
                    name: name.clone(),
                })
            })
            .collect()
    }
}

/// Where in the cache the indexes of the tree in `dir` are, which are made where they are missing.
fn cached_index(cache: &Cache, dir: &Path) -> Result<PathBuf, ModulesError> {
    let metadata = fs::metadata(dir).map_err(ModulesError::io(dir))?;
    let key = format!(
        "{:x}-{:x}-{:x}.{:x}",
        metadata.dev(),
        metadata.ino(),
        metadata.ctime(),
        metadata.ctime_nsec()
    );
    let target = cache.side_dir("indexes")?.join(key);
    if target.join(DEPENDENCIES).is_file() {
        return Ok(target);
    }
    let _lock = cache.exclusive("indexes")?;
    if target.join(DEPENDENCIES).is_file() {
        return Ok(target);
    }
    let stage = cache.stage()?;
    let staged = stage.path().join("index");
    fs::create_dir(&staged).map_err(ModulesError::io(&staged))?;
    depmod::write_index(dir, &staged)?;
    fs::rename(&staged, &target).map_err(ModulesError::io(&target))?;
    Ok(target)
}

/// Copies the modules and index files of a tree; links (`build`, `source`) are left out.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(&source, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        }
    }
    Ok(())
}

/// A module's name as the kernel writes it: `-` and `_` are the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of the module in a file.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    SUFFIXES
        .iter()
        .find_map(|suffix| file.strip_suffix(suffix))
        .map(canonical)
}

/// Reads an index file of the tree; None where there is none.
fn read_index(dir: &Path, name: &str) -> Result<Option<String>, ModulesError> {
    let path = dir.join(name);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ModulesError::io(&path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_INDEX)
        .read_to_end(&mut bytes)
        .map_err(ModulesError::io(&path))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// `modules.dep`: `path: path of what it needs …`.
fn parse_dependencies(text: &str) -> HashMap<String, Entry> {
    let mut modules = HashMap::new();
    for line in text.lines() {
        let Some((path, needs)) = line.split_once(':') else {
            continue;
        };
        let path = Path::new(path);
        let is_below = path
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let Some(name) = module_name(path).filter(|_| is_below) else {
            continue;
        };
        // The one to be loaded first stands last.
        let needs = needs
            .split_whitespace()
            .filter_map(|need| module_name(Path::new(need)))
            .collect();
        let path = path.to_owned();
        modules.insert(name, Entry { path, needs });
    }
    modules
}

/// `modules.alias`: `alias PATTERN MODULE`. Only those that are plain names are kept.
fn parse_aliases(text: &str) -> HashMap<String, Vec<String>> {
    let mut aliases: HashMap<String, Vec<String>> = HashMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some("alias"), Some(alias), Some(module)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if !alias.contains(['*', '?', '[']) {
            let targets = aliases.entry(canonical(alias)).or_default();
            targets.push(canonical(module));
        }
    }
    aliases
}

/// `modules.softdep`: `softdep MODULE pre: a b post: c`. Only what comes before is kept.
fn parse_soft(text: &str) -> HashMap<String, Vec<String>> {
    let mut soft: HashMap<String, Vec<String>> = HashMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some("softdep"), Some(module)) = (words.next(), words.next()) else {
            continue;
        };
        let before = words
            .skip_while(|&word| word != "pre:")
            .skip(1)
            .take_while(|&word| word != "post:")
            .map(canonical);
        soft.entry(canonical(module)).or_default().extend(before);
    }
    soft
}

fn read_module(path: &Path) -> Result<Vec<u8>, ModulesError> {
    let file = File::open(path).map_err(ModulesError::io(path))?;
    let suffix = path.extension().and_then(OsStr::to_str).unwrap_or("ko");
    // An uncompressed module passes through like a tar file.
    let suffix = if suffix == "ko" { "tar" } else { suffix };
    let decoder = crate::archive::decoder(suffix, file)
        .map_err(|error| ModulesError::io(path)(io::Error::other(error)))?;
    let mut bytes = Vec::new();
    decoder
        .take(MAX_MODULE + 1)
        .read_to_end(&mut bytes)
        .map_err(ModulesError::io(path))?;
    if bytes.len() as u64 > MAX_MODULE {
        return Err(ModulesError::TooLarge(path.to_owned()));
    }
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests;
