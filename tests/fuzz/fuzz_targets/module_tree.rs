//! A tree of kernel modules: its indexes, and a module's own description.
//!
//! The input's parts, between bytes of 0xff, are `modules.dep`, `.alias`, `.softdep`, `.builtin`
//! and a module without indexes.

#![no_main]

use std::fs;

use kernels::modules::{self, ModuleTree};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

fuzz_target!(|data: &[u8]| {
    let dir = TempDir::with_prefix_in("mvm-fuzz-", "/dev/shm").expect("a directory in memory");
    let mut parts = data.splitn(5, |&byte| byte == 0xff);
    for index in ["dep", "alias", "softdep", "builtin"] {
        let path = dir.path().join(format!("modules.{index}"));
        fs::write(path, parts.next().unwrap_or_default()).expect("room for an index");
    }
    if let Ok(tree) = ModuleTree::open(dir.path())
        && let Ok(order) = tree.resolve(&["a"], &["b", "c"])
    {
        let mut names: Vec<_> = order.iter().map(|module| &module.name).collect();
        names.sort();
        assert!(
            names.windows(2).all(|two| two[0] != two[1]),
            "a module is there twice"
        );
    }
    if let Some(module) = parts.next() {
        fs::write(dir.path().join("a.ko"), module).expect("room for a module");
        modules::index(dir.path()).expect("a tree with one module");
    }
});
