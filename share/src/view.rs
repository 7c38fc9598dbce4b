//! What of a directory a share shows: an allow-list of paths below it.
//!
//! Made for the host's own root, whose guest may be hostile and root: what is not to be seen is neither
//! listed nor found. What a path is decides first: each is shown with all that is below it, leads to
//! something that is, or is hidden. What the file is decides then: only regular files, directories and symbolic links
//! are shown, and only what [`Readers`] may read.
//!
//! An inode keeps the [`Scope`] it was found in, from which that of a name in it follows in one step.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::FileType;

use crate::host::{self, Key, Stat, Time};

/// Whose permission to read makes that a file is shown. Each takes in those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Readers {
    /// Everybody's on the host, whoever runs this process.
    Everybody,
    /// Also that of the user who runs this process, for their own files. What has one of the
    /// names of [`View::hide_names`] is hidden.
    Owner,
    /// This process's own.
    Process,
}

/// What is said of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// What is said of the directory it is in.
    AsAbove,
    Show(Readers),
    Hide,
}

#[derive(Debug, Clone)]
struct Node {
    rule: Rule,
    /// Names in it of which something is said, or of what is below them.
    below: HashMap<Box<[u8]>, usize>,
}

impl Node {
    fn new(rule: Rule) -> Self {
        Self {
            rule,
            below: HashMap::new(),
        }
    }
}

/// An allow-list of paths. In the beginning nothing is shown.
///
/// Paths are those from the root of the share on, with or without a slash in front; `..` takes back the
/// name before it. Symbolic links in them are not followed. Of several that were said, the longest
/// decides.
#[derive(Debug, Clone)]
pub struct View {
    /// Directories come before what is in them; the root is the first.
    nodes: Vec<Node>,
    names: HashSet<Box<[u8]>>,
}

impl Default for View {
    fn default() -> Self {
        Self {
            nodes: vec![Node::new(Rule::Hide)],
            names: HashSet::new(),
        }
    }
}

impl View {
    /// Shows `path` and what is below it. What was said of paths below it before still holds.
    pub fn show(&mut self, path: &Path, readers: Readers) {
        let node = self.node_at(path);
        node.rule = Rule::Show(readers);
    }

    /// Hides `path` and what is below it, whatever was said of that before. The file that it is now is
    /// hidden by other names too.
    pub fn hide(&mut self, path: &Path) {
        let node = self.node_at(path);
        *node = Node::new(Rule::Hide);
    }

    /// Hides what has one of these names wherever [`Readers::Owner`] may read.
    pub fn hide_names<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        self.names
            .extend(names.into_iter().map(|name| name.as_bytes().into()));
    }

    fn node_at(&mut self, path: &Path) -> &mut Node {
        let mut names: Vec<&[u8]> = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => names.push(name.as_bytes()),
                Component::ParentDir => drop(names.pop()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        let mut at = 0;
        for name in names {
            let new = self.nodes.len();
            at = *self.nodes[at].below.entry(name.into()).or_insert(new);
            if at == new {
                self.nodes.push(Node::new(Rule::AsAbove));
            }
        }
        &mut self.nodes[at]
    }

    /// Makes this what is seen of `root`, by a process of the user `uid`.
    pub(crate) fn of(self, root: BorrowedFd<'_>, uid: u32) -> Filter {
        let mut places: Vec<_> = self.nodes.iter().map(|_| Place::default()).collect();
        places[0].readers = readers(self.nodes[0].rule, None);
        for (at, node) in self.nodes.iter().enumerate() {
            for &below in node.below.values() {
                places[below].readers = readers(self.nodes[below].rule, places[at].readers);
            }
        }
        // What leads to something is known from what is below it.
        for (at, node) in self.nodes.iter().enumerate().rev() {
            let leads = |&below: &usize| places[below].is_shown;
            places[at].is_shown = places[at].readers.is_some() || node.below.values().any(leads);
        }
        places[0].is_shown = true;
        let is_hidden = |at: usize| self.nodes[at].rule == Rule::Hide && !places[at].is_shown;
        let mut hidden = HashMap::new();
        find_hidden(&self.nodes, 0, root, &is_hidden, &mut hidden);
        let first_leaf = places.len();
        for (place, node) in places.iter_mut().zip(self.nodes) {
            place.below = node.below;
        }
        places.extend(LEAVES.map(|readers| Place {
            readers: Some(readers),
            is_shown: true,
            below: HashMap::new(),
        }));
        Filter {
            places,
            first_leaf,
            names: self.names,
            hidden,
            uid,
        }
    }
}

/// The order in which places for all that is below others stand.
const LEAVES: [Readers; 3] = [Readers::Everybody, Readers::Owner, Readers::Process];

fn readers(rule: Rule, above: Option<Readers>) -> Option<Readers> {
    match rule {
        Rule::AsAbove => above,
        Rule::Show(readers) => Some(readers),
        Rule::Hide => None,
    }
}

/// Finds what hidden paths are at the moment.
fn find_hidden(
    nodes: &[Node],
    at: usize,
    dir: BorrowedFd<'_>,
    is_hidden: &dyn Fn(usize) -> bool,
    hidden: &mut HashMap<Key, Option<Time>>,
) {
    for (name, &below) in &nodes[at].below {
        let held = CString::new(&**name)
            .ok()
            .and_then(|name| host::hold(dir, &name).ok());
        // What is not there, or cannot be reached, has no other names that could be known.
        let Some(held) = held else {
            continue;
        };
        if is_hidden(below)
            && let Ok(stat) = Stat::fd(held.as_fd())
        {
            hidden.insert(stat.key, stat.birth);
        }
        find_hidden(nodes, below, held.as_fd(), is_hidden, hidden);
    }
}

/// Where in a view something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scope(u32);

impl Scope {
    /// That of the share's root.
    pub const ROOT: Self = Self(0);

    pub fn number(self) -> u32 {
        self.0
    }

    pub fn from_number(number: u32) -> Self {
        Self(number)
    }

    fn at(place: usize) -> Option<Self> {
        u32::try_from(place).ok().map(Self)
    }
}

#[derive(Debug, Default)]
struct Place {
    /// Whose permissions count; None where nothing but what leads on is shown.
    readers: Option<Readers>,
    /// Whether it, or something below it, is shown.
    is_shown: bool,
    below: HashMap<Box<[u8]>, usize>,
}

/// A view that is in use.
#[derive(Debug)]
pub(crate) struct Filter {
    places: Vec<Place>,
    /// Where the places begin for what is below others and of which nothing else is said.
    first_leaf: usize,
    names: HashSet<Box<[u8]>>,
    /// Hidden files, by any name.
    hidden: HashMap<Key, Option<Time>>,
    /// Who runs this process.
    uid: u32,
}

impl Filter {
    fn place(&self, scope: Scope) -> Option<&Place> {
        self.places.get(usize::try_from(scope.0).ok()?)
    }

    /// Whose permissions count in `scope`.
    pub fn readers(&self, scope: Scope) -> Option<Readers> {
        self.place(scope)?.readers
    }

    /// The scope of `name` in a directory of `scope`; None where it is hidden.
    pub fn below(&self, scope: Scope, name: &CStr) -> Option<Scope> {
        let place = self.place(scope)?;
        let name = name.to_bytes();
        if let Some(&below) = place.below.get(name) {
            return Scope::at(below).filter(|_| self.places.get(below).is_some_and(|p| p.is_shown));
        }
        let readers = place.readers?;
        if readers == Readers::Owner && self.names.contains(name) {
            return None;
        }
        let leaf = LEAVES.iter().position(|leaf| *leaf == readers)?;
        Scope::at(self.first_leaf + leaf)
    }

    /// Whether a file that was found in `scope` is shown.
    pub fn shows(&self, scope: Scope, stat: &Stat) -> bool {
        if self.hidden.get(&stat.key) == Some(&stat.birth) {
            return false;
        }
        let readers = self.readers(scope);
        match stat.kind() {
            FileType::Directory => readers.is_none_or(|who| self.may(who, stat, 0o1)),
            FileType::RegularFile => readers.is_some_and(|who| self.may(who, stat, 0o4)),
            FileType::Symlink => true,
            _ => false,
        }
    }

    /// Whether a directory of `scope` is listed, as far as what is in it is shown.
    pub fn lists(&self, scope: Scope, stat: &Stat) -> bool {
        self.readers(scope)
            .is_none_or(|who| self.may(who, stat, 0o4))
    }

    fn may(&self, readers: Readers, stat: &Stat, permission: u32) -> bool {
        let own = readers == Readers::Owner && stat.uid == self.uid;
        readers == Readers::Process
            || stat.mode & permission != 0
            || (own && stat.mode & (permission << 6) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags};

    /// What a user with the number 1000 sees of a directory that is empty.
    fn filter(view: View) -> Filter {
        let dir = tempfile::tempdir().unwrap();
        let root = rustix::fs::openat(CWD, dir.path(), OFlags::PATH, Mode::empty()).unwrap();
        view.of(root.as_fd(), 1000)
    }

    fn scope(filter: &Filter, path: &str) -> Option<Scope> {
        let mut names = path.split('/').filter(|name| !name.is_empty());
        names.try_fold(Scope::ROOT, |scope, name| {
            filter.below(scope, &CString::new(name).unwrap())
        })
    }

    fn seen(filter: &Filter, path: &str) -> Option<Option<Readers>> {
        scope(filter, path).map(|scope| filter.readers(scope))
    }

    fn file(kind: FileType, mode: u32, uid: u32) -> Stat {
        let nothing = Stat::nothing(Key { dev: 1, ino: 1 }, kind);
        Stat {
            mode: kind.as_raw_mode() | mode,
            uid,
            ..nothing
        }
    }

    #[test]
    fn in_the_beginning_there_is_an_empty_root() {
        let filter = filter(View::default());
        assert_eq!(seen(&filter, "/"), Some(None));
        assert_eq!(seen(&filter, "/usr"), None);
        let root = file(FileType::Directory, 0o700, 0);
        assert!(filter.shows(Scope::ROOT, &root) && filter.lists(Scope::ROOT, &root));
    }

    #[test]
    fn the_longest_path_decides() {
        let mut view = View::default();
        view.show(Path::new("/usr"), Readers::Everybody);
        view.hide(Path::new("/usr/local/secret"));
        view.show(
            Path::new("/usr/local/secret/but/not/this"),
            Readers::Process,
        );
        view.show(Path::new("home/me/.cargo/"), Readers::Owner);
        let filter = filter(view);
        for (path, expected) in [
            ("/usr", Some(Some(Readers::Everybody))),
            ("/usr/bin/a/b/c", Some(Some(Readers::Everybody))),
            ("/usr/local", Some(Some(Readers::Everybody))),
            ("/usr/local/bin", Some(Some(Readers::Everybody))),
            ("/usr/local/secret", Some(None)),
            ("/usr/local/secret/file", None),
            ("/usr/local/secret/but/not", Some(None)),
            (
                "/usr/local/secret/but/not/this/at/all",
                Some(Some(Readers::Process)),
            ),
            ("/home", Some(None)),
            ("/home/you", None),
            ("/home/me/.ssh", None),
            ("/home/me/.cargo/bin", Some(Some(Readers::Owner))),
            ("/etc", None),
        ] {
            assert_eq!(seen(&filter, path), expected, "{path}");
        }
    }

    #[test]
    fn hiding_takes_all_below_with_it_and_showing_does_not() {
        let mut view = View::default();
        view.show(Path::new("/home/me/.cargo"), Readers::Owner);
        view.hide(Path::new("/home/me"));
        view.hide(Path::new("/srv/a/secret"));
        view.show(Path::new("/srv"), Readers::Process);
        let filter = filter(view);
        assert_eq!(seen(&filter, "/home"), None, "it leads nowhere");
        assert_eq!(seen(&filter, "/srv/a/secret"), None);
        assert_eq!(
            seen(&filter, "/srv/a/other"),
            Some(Some(Readers::Process)),
            "what is between takes after what is above"
        );
    }

    #[test]
    fn a_path_does_not_lead_out_by_going_upwards() {
        let mut view = View::default();
        view.show(Path::new("/../a/./b/../c"), Readers::Everybody);
        let filter = filter(view);
        assert_eq!(seen(&filter, "/a/b"), None);
        assert_eq!(seen(&filter, "/a/c"), Some(Some(Readers::Everybody)));
    }

    #[test]
    fn names_are_hidden_where_the_owner_may_read() {
        let mut view = View::default();
        view.hide_names([".netrc"]);
        view.show(Path::new("/usr"), Readers::Everybody);
        view.show(Path::new("/tools"), Readers::Owner);
        view.show(Path::new("/mine"), Readers::Process);
        let filter = filter(view);
        assert_eq!(seen(&filter, "/tools/deep/down/.netrc"), None);
        assert_eq!(seen(&filter, "/tools/.netrc"), None);
        assert!(seen(&filter, "/usr/.netrc").is_some());
        assert!(seen(&filter, "/mine/.netrc").is_some());
    }

    #[test]
    fn permissions_decide_by_who_may_read() {
        let mut view = View::default();
        view.show(Path::new("/all"), Readers::Everybody);
        view.show(Path::new("/own"), Readers::Owner);
        view.show(Path::new("/any"), Readers::Process);
        let filter = filter(view);
        let scope = |path| scope(&filter, path).unwrap();
        let (all, own, any) = (scope("/all/x"), scope("/own/x"), scope("/any/x"));
        let regular = FileType::RegularFile;
        for (mode, uid, expected) in [
            (0o644, 0, [true, true, true]),
            (0o004, 1000, [true, true, true]),
            (0o600, 1000, [false, true, true]),
            (0o640, 0, [false, false, true]),
            (0o000, 1000, [false, false, true]),
            (0o711, 1000, [false, true, true]),
        ] {
            let stat = file(regular, mode, uid);
            let shown = [all, own, any].map(|scope| filter.shows(scope, &stat));
            assert_eq!(shown, expected, "{mode:o} of {uid}");
        }
        let passable = file(FileType::Directory, 0o711, 0);
        assert!(filter.shows(all, &passable) && !filter.lists(all, &passable));
        let closed = file(FileType::Directory, 0o700, 0);
        assert!(!filter.shows(all, &closed) && !filter.shows(own, &closed));
        let mine = file(FileType::Directory, 0o700, 1000);
        assert!(filter.shows(own, &mine) && filter.lists(own, &mine) && !filter.shows(all, &mine));
    }

    #[test]
    fn what_is_no_file_is_never_shown() {
        let mut view = View::default();
        view.show(Path::new("/"), Readers::Process);
        let filter = filter(view);
        let scope = scope(&filter, "/x").unwrap();
        for kind in [
            FileType::CharacterDevice,
            FileType::BlockDevice,
            FileType::Fifo,
            FileType::Socket,
        ] {
            assert!(!filter.shows(scope, &file(kind, 0o666, 1000)), "{kind:?}");
        }
        assert!(filter.shows(scope, &file(FileType::Symlink, 0o777, 0)));
        let passage = file(FileType::RegularFile, 0o644, 0);
        let empty = super::tests::filter(View::default());
        assert!(!empty.shows(Scope::ROOT, &passage));
    }
}
