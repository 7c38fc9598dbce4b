//! What `depmod` does at a package's installation: reads each module's `.modinfo` and writes the
//! indexes of the tree.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::{DEPENDENCIES, ModulesError, canonical, module_name, read_module};
use crate::elf;

/// How deep a tree's directories go at most.
const MAX_DEPTH: usize = 32;

/// What a module's `.modinfo` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Info {
    depends: Vec<String>,
    aliases: Vec<String>,
    soft: Vec<String>,
}

/// The modules of a tree by name.
struct Scan(BTreeMap<String, (PathBuf, Info)>);

/// Writes `modules.dep`, `modules.alias` and `modules.softdep` of the tree in `dir` into it.
///
/// # Errors
/// When there are no modules, one cannot be read, or an index cannot be written.
pub fn index(dir: &Path) -> Result<(), ModulesError> {
    write_index(dir, dir)
}

/// As [`index`], with the indexes in the directory `to`.
pub(super) fn write_index(dir: &Path, to: &Path) -> Result<(), ModulesError> {
    let scan = scan(dir)?;
    if scan.0.is_empty() {
        return Err(ModulesError::NotATree(dir.to_owned()));
    }
    for (name, text) in [
        ("modules.alias", scan.alias_text()),
        ("modules.softdep", scan.soft_text()),
        (DEPENDENCIES, scan.dependency_text()),
    ] {
        let path = to.join(name);
        fs::write(&path, text).map_err(ModulesError::io(&path))?;
    }
    Ok(())
}

/// Reads the `.modinfo` of all modules below `dir`, on all CPUs.
fn scan(dir: &Path) -> Result<Scan, ModulesError> {
    let mut files = Vec::new();
    list(dir, PathBuf::new(), MAX_DEPTH, &mut files)?;
    files.sort();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = files.len().div_ceil(threads).max(1);
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = files
            .chunks(share)
            .map(|part| {
                scope.spawn(move || {
                    part.iter()
                        .map(|(name, path)| {
                            let bytes = read_module(&dir.join(path))?;
                            Ok((name.clone(), (path.clone(), parse(&bytes))))
                        })
                        .collect::<Result<Vec<_>, ModulesError>>()
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|p| std::panic::resume_unwind(p))
            })
            .collect::<Result<Vec<_>, _>>()
    })?;
    Ok(Scan(results.into_iter().flatten().collect()))
}

/// Collects the modules below `dir` as (name, path from the tree's root).
fn list(
    root: &Path,
    below: PathBuf,
    depth: usize,
    files: &mut Vec<(String, PathBuf)>,
) -> Result<(), ModulesError> {
    let dir = root.join(&below);
    let Some(depth) = depth.checked_sub(1) else {
        return Ok(());
    };
    for entry in fs::read_dir(&dir).map_err(ModulesError::io(&dir))? {
        let entry = entry.map_err(ModulesError::io(&dir))?;
        let kind = entry.file_type().map_err(ModulesError::io(&dir))?;
        let path = below.join(entry.file_name());
        if kind.is_dir() {
            list(root, path, depth, files)?;
        } else if kind.is_file()
            && let Some(name) = module_name(&path)
        {
            files.push((name, path));
        }
    }
    Ok(())
}

/// Reads the `.modinfo` section: `key=value` strings, each ended by a zero byte.
fn parse(module: &[u8]) -> Info {
    let mut info = Info::default();
    let section = elf::section(module, b".modinfo").unwrap_or_default();
    for record in section.split(|&b| b == 0) {
        let Ok(record) = std::str::from_utf8(record) else {
            continue;
        };
        match record.split_once('=') {
            Some(("depends", value)) => info.depends.extend(
                value
                    .split(',')
                    .filter(|name| !name.is_empty())
                    .map(canonical),
            ),
            Some(("alias", value)) => info.aliases.push(value.to_owned()),
            Some(("softdep", value)) => info.soft.push(value.to_owned()),
            _ => {}
        }
    }
    info
}

impl Scan {
    fn dependency_text(&self) -> String {
        let mut text = String::new();
        for (name, (path, _)) in &self.0 {
            let _ = write!(text, "{}:", path.display());
            for need in self.all_needs(name) {
                if let Some((path, _)) = self.0.get(need) {
                    let _ = write!(text, " {}", path.display());
                }
            }
            text.push('\n');
        }
        text
    }

    /// All that a module needs, directly or not; what has to be loaded first stands last.
    fn all_needs<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        let mut order = Vec::new();
        let mut met = HashSet::new();
        let mut work = vec![(name, false)];
        while let Some((current, is_done)) = work.pop() {
            if is_done {
                order.push(current);
            } else if met.insert(current) {
                work.push((current, true));
                let needs = self.0.get(current).map(|(_, info)| &info.depends);
                work.extend(
                    needs
                        .into_iter()
                        .flatten()
                        .map(|need| (need.as_str(), false)),
                );
            }
        }
        // The module itself was done last.
        order.pop();
        order.reverse();
        order
    }

    fn alias_text(&self) -> String {
        self.lines("alias", |name, info| {
            info.aliases
                .iter()
                .map(|alias| format!("{alias} {name}"))
                .collect()
        })
    }

    fn soft_text(&self) -> String {
        self.lines("softdep", |name, info| {
            info.soft
                .iter()
                .map(|soft| format!("{name} {soft}"))
                .collect()
        })
    }

    fn lines(&self, keyword: &str, of: impl Fn(&str, &Info) -> Vec<String>) -> String {
        let mut text = String::new();
        for (name, (_, info)) in &self.0 {
            for line in of(name, info) {
                let _ = writeln!(text, "{keyword} {line}");
            }
        }
        text
    }
}
