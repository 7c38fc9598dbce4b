//! The repository's files, and what of them can be measured.

use std::fs;
use std::path::{Path, PathBuf};

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Names of what holds nothing of the repository's own; `.git` is a file in a linked worktree.
const PASSED_OVER: [&str; 4] = [".git", "artifacts", "corpus", "target"];

/// The repository's root.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("a crate below the root").to_owned()
}

/// One text file.
pub struct Text {
    /// From the root, with slashes.
    pub path: String,
    pub text: String,
}

/// All files that are UTF-8, in the order of their paths.
pub fn texts() -> Vec<Text> {
    let mut paths = Vec::new();
    collect(&root(), &mut paths);
    paths.sort();
    paths
        .into_iter()
        .filter_map(|path| {
            let text = String::from_utf8(fs::read(&path).ok()?).ok()?;
            let path = path.strip_prefix(root()).expect("a file of the root");
            let path = path.to_str()?.to_owned();
            Some(Text { path, text })
        })
        .collect()
}

fn collect(dir: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a readable directory") {
        let entry = entry.expect("a readable directory");
        let kind = entry.file_type().expect("a file type");
        let name = entry.file_name();
        if PASSED_OVER.iter().any(|passed| name == *passed) {
            continue;
        }
        if kind.is_dir() {
            collect(&entry.path(), paths);
        } else if kind.is_file() {
            paths.push(entry.path());
        }
    }
}

/// One file of Rust.
pub struct Source {
    /// From the root, with slashes.
    pub path: String,
    pub text: String,
    tree: syn::File,
}

/// All Rust files.
pub fn sources() -> Vec<Source> {
    let rust = |text: &Text| text.path.ends_with(".rs");
    let parse = |text: Text| Source::parse(text.path, text.text);
    texts().into_iter().filter(rust).map(parse).collect()
}

impl Source {
    /// A file with these contents.
    pub fn parse(path: String, text: String) -> Self {
        let tree = syn::parse_file(&text).unwrap_or_else(|error| panic!("{path}: {error}"));
        Self { path, text, tree }
    }

    /// Whether the file as a whole belongs to tests.
    pub fn is_test(&self) -> bool {
        let path = Path::new(&self.path);
        let named = |name: &str| name == "tests.rs" || name.ends_with("_tests.rs");
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(named)
            || path.components().any(|part| part.as_os_str() == "tests")
    }

    /// Lines of the file besides its tests.
    pub fn lines(&self) -> usize {
        let tests: usize = self
            .tree
            .items
            .iter()
            .filter(|item| is_for_tests(attributes(item)))
            .map(lines_of)
            .sum();
        self.text.lines().count() - tests
    }

    /// The functions besides those of the tests.
    pub fn functions(&self) -> Vec<Function> {
        let mut found = Functions(Vec::new());
        found.visit_file(&self.tree);
        found.0
    }

    /// The lines besides those of tests where something unsafe begins: a block, a function, an
    /// implementation, a foreign function.
    pub fn unsafe_lines(&self) -> Vec<usize> {
        let mut found = Unsafe(Vec::new());
        found.visit_file(&self.tree);
        found.0
    }

    /// How many methods the trait `name` has; None where the file has no such trait.
    pub fn methods_of(&self, name: &str) -> Option<usize> {
        self.tree.items.iter().find_map(|item| match item {
            syn::Item::Trait(item) if item.ident == name => Some(
                item.items
                    .iter()
                    .filter(|item| matches!(item, syn::TraitItem::Fn(_)))
                    .count(),
            ),
            _ => None,
        })
    }
}

fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether there is a `#[cfg(test)]`.
fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Path>()
                .is_ok_and(|condition| condition.is_ident("test"))
    })
}

/// Lines from the first to the last of something.
fn lines_of(what: &impl Spanned) -> usize {
    let span = what.span();
    span.end().line + 1 - span.start().line
}

/// One function.
pub struct Function {
    pub name: String,
    /// Where it begins.
    pub line: usize,
    /// From its signature to its closing brace.
    pub lines: usize,
    /// Besides `self`.
    pub parameters: usize,
}

struct Functions(Vec<Function>);

impl Functions {
    fn add(&mut self, signature: &syn::Signature, body: &syn::Block) {
        let line = signature.span().start().line;
        let receiver = usize::from(signature.receiver().is_some());
        self.0.push(Function {
            name: signature.ident.to_string(),
            line,
            lines: body.span().end().line + 1 - line,
            parameters: signature.inputs.len() - receiver,
        });
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_for_tests(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.add(&item.sig, body);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

struct Unsafe(Vec<usize>);

impl<'ast> Visit<'ast> for Unsafe {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_for_tests(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_expr_unsafe(&mut self, block: &'ast syn::ExprUnsafe) {
        self.0.push(block.unsafe_token.span.start().line);
        visit::visit_expr_unsafe(self, block);
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        if let syn::Safety::Unsafe(token) = &signature.safety {
            self.0.push(token.span.start().line);
        }
        visit::visit_signature(self, signature);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let token = item.unsafety.as_ref();
        self.0.extend(token.map(|token| token.span.start().line));
        visit::visit_item_impl(self, item);
    }

    fn visit_item_foreign_mod(&mut self, item: &'ast syn::ItemForeignMod) {
        self.0.push(item.span().start().line);
    }
}
