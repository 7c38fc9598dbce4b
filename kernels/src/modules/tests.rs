//! Tests of module trees: the order of loading, names, and what damaged indexes do.

use std::io::Write;

use super::*;

/// A module: an ELF object whose `.modinfo` holds these records.
pub(crate) fn module(records: &[&str]) -> Vec<u8> {
    let mut info = Vec::new();
    for record in records {
        info.extend_from_slice(record.as_bytes());
        info.push(0);
    }
    let names = b"\0.shstrtab\0.modinfo\0";
    let mut elf = vec![0; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[16..18].copy_from_slice(&1u16.to_le_bytes());
    elf[18..20].copy_from_slice(&62u16.to_le_bytes());
    elf.extend_from_slice(names);
    elf.extend_from_slice(&info);
    elf.resize(elf.len().next_multiple_of(8), 0);
    let table = elf.len() as u64;
    let mut section = |name: u32, kind: u32, offset: u64, size: u64| {
        elf.extend_from_slice(&name.to_le_bytes());
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&[0; 16]);
        elf.extend_from_slice(&offset.to_le_bytes());
        elf.extend_from_slice(&size.to_le_bytes());
        elf.extend_from_slice(&[0; 24]);
    };
    section(0, 0, 0, 0);
    section(1, 3, 64, names.len() as u64);
    section(11, 1, 64 + names.len() as u64, info.len() as u64);
    elf[40..48].copy_from_slice(&table.to_le_bytes());
    elf[52..54].copy_from_slice(&64u16.to_le_bytes());
    elf[58..60].copy_from_slice(&64u16.to_le_bytes());
    elf[60..62].copy_from_slice(&3u16.to_le_bytes());
    elf[62..64].copy_from_slice(&1u16.to_le_bytes());
    elf
}

struct Fixture(tempfile::TempDir);

impl Fixture {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let fixture = Self(tempfile::tempdir().unwrap());
        for (name, bytes) in files {
            fixture.write(name, bytes);
        }
        fixture
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.dir().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("tree")
    }

    fn cache(&self) -> Cache {
        Cache::at(&self.0.path().join("cache")).unwrap()
    }

    fn resolve(&self, required: &[&str], optional: &[&str]) -> Result<Vec<Module>, ModulesError> {
        ModuleTree::open(&self.dir())?.resolve(required, optional)
    }

    fn names(&self, required: &[&str]) -> Vec<String> {
        let modules = self.resolve(required, &[]).unwrap();
        modules.into_iter().map(|module| module.name).collect()
    }
}

const DEP: &[u8] = b"kernel/a.ko: kernel/b.ko kernel/c-d.ko.xz\nkernel/b.ko: kernel/c-d.ko.xz\n\
    kernel/c-d.ko.xz:\nkernel/e.ko:\nkernel/fast.ko:\nkernel/slow.ko: kernel/e.ko\n";

#[test]
fn what_a_module_needs_comes_before_it_and_once() {
    let fixture = Fixture::new(&[("modules.dep", DEP)]);
    assert_eq!(fixture.names(&["a"]), ["c_d", "b", "a"]);
    assert_eq!(fixture.names(&["b", "a", "c-d"]), ["c_d", "b", "a"]);
    assert_eq!(fixture.names(&["c_d"]), ["c_d"]);
    let modules = fixture.resolve(&["c-d"], &[]).unwrap();
    assert_eq!(modules[0].path, fixture.dir().join("kernel/c-d.ko.xz"));
}

#[test]
fn what_is_built_in_is_passed_over_and_what_is_missing_is_named() {
    let fixture = Fixture::new(&[
        ("modules.dep", DEP),
        (
            "modules.builtin",
            b"kernel/fs/ext4/ext4.ko\nkernel/x-y.ko\n",
        ),
    ]);
    assert_eq!(fixture.names(&["ext4", "x_y"]), [""; 0]);
    let error = fixture
        .resolve(&["a", "zfs", "nvme", "ext4"], &[])
        .unwrap_err();
    assert!(error.to_string().contains("nvme, zfs"), "{error}");
}

#[test]
fn what_is_optional_may_be_missing_and_is_marked() {
    let fixture = Fixture::new(&[("modules.dep", DEP)]);
    let modules = fixture.resolve(&["b"], &["a", "zfs"]).unwrap();
    let marked: Vec<(&str, bool)> = modules
        .iter()
        .map(|module| (module.name.as_str(), module.required))
        .collect();
    assert_eq!(marked, [("c_d", true), ("b", true), ("a", false)]);
}

#[test]
fn soft_dependencies_and_aliases_come_first_and_are_not_required() {
    let fixture = Fixture::new(&[
        ("modules.dep", DEP),
        (
            "modules.alias",
            b"alias crypto-crc fast\nalias crypto-crc slow\nalias crypto-* e\nalias only e\n\
              alias gone nothing\n",
        ),
        ("modules.softdep", b"softdep c-d pre: crypto_crc post: e\n"),
    ]);
    let modules = fixture.resolve(&["c_d"], &[]).unwrap();
    let marked: Vec<(&str, bool)> = modules
        .iter()
        .map(|module| (module.name.as_str(), module.required))
        .collect();
    assert_eq!(
        marked,
        [
            ("e", false),
            ("slow", false),
            ("fast", false),
            ("c_d", true)
        ]
    );
    assert_eq!(fixture.names(&["only"]), ["e"]);
    assert!(fixture.resolve(&["gone"], &[]).is_err());
}

#[test]
fn a_module_first_met_as_optional_becomes_required_with_what_it_needs() {
    let fixture = Fixture::new(&[
        ("modules.dep", DEP),
        (
            "modules.softdep",
            b"softdep e pre: slow b\nsoftdep fast pre: b\n",
        ),
    ]);
    let modules = fixture.resolve(&["fast", "b"], &[]).unwrap();
    assert!(modules.iter().all(|module| module.required), "{modules:?}");
}

#[test]
fn circles_and_long_chains_end() {
    let mut chain = String::from("x0.ko: x1.ko\n");
    for i in 1..50_000 {
        chain.push_str(&format!("x{i}.ko: x{}.ko\n", (i + 1) % 50_000));
    }
    let fixture = Fixture::new(&[("modules.dep", chain.as_bytes())]);
    assert_eq!(fixture.names(&["x0"]).len(), 50_000);
}

#[test]
fn index_lines_that_lead_out_or_make_no_sense_are_passed_over() {
    let fixture = Fixture::new(&[(
        "modules.dep",
        b"../up.ko:\n/abs.ko:\nno colon\n:\nkernel/README:\n\xff\xfe.ko:\nkernel/ok.ko: ../up.ko\n",
    )]);
    assert_eq!(fixture.names(&["ok"]), ["ok"]);
    assert!(fixture.resolve(&["up"], &[]).is_err());
    assert!(fixture.resolve(&["abs"], &[]).is_err());
}

#[test]
fn each_compression_of_a_module_is_read() {
    let plain = module(&["name=x"]);
    let xz = {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(&plain).unwrap();
        encoder.finish().unwrap()
    };
    let gz = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&plain).unwrap();
        encoder.finish().unwrap()
    };
    let zst = zstd::stream::encode_all(&*plain, 1).unwrap();
    let fixture = Fixture::new(&[
        ("modules.dep", b"a.ko:\nb.ko.xz:\nc.ko.gz:\nd.ko.zst:\n"),
        ("a.ko", &plain),
        ("b.ko.xz", &xz),
        ("c.ko.gz", &gz),
        ("d.ko.zst", &zst),
    ]);
    for module in fixture.resolve(&["a", "b", "c", "d"], &[]).unwrap() {
        assert_eq!(module.read().unwrap(), plain, "{}", module.name);
    }
    fixture.write("b.ko.xz", &xz[..xz.len() / 2]);
    let damaged = &fixture.resolve(&["b"], &[]).unwrap()[0];
    assert!(damaged.read().is_err(), "half a module was read");
}

#[test]
fn an_index_is_made_as_depmod_does() {
    // c needs b needs a; c also names a first, which must not come out in a wrong order.
    let fixture = Fixture::new(&[
        ("kernel/a.ko", &module(&["license=GPL", "depends="])),
        (
            "kernel/b-x.ko",
            &module(&["depends=a", "alias=fs-b", "softdep=pre: crc"]),
        ),
        ("kernel/sub/c.ko", &module(&["depends=a,b_x"])),
        ("kernel/broken.ko", b"no ELF file"),
    ]);
    index(&fixture.dir()).unwrap();
    let read = |name| fs::read_to_string(fixture.dir().join(name)).unwrap();
    assert_eq!(
        read("modules.dep"),
        "kernel/a.ko:\nkernel/b-x.ko: kernel/a.ko\nkernel/broken.ko:\n\
         kernel/sub/c.ko: kernel/b-x.ko kernel/a.ko\n"
    );
    assert_eq!(read("modules.alias"), "alias fs-b b_x\n");
    assert_eq!(read("modules.softdep"), "softdep b_x pre: crc\n");
    assert_eq!(fixture.names(&["c"]), ["a", "b_x", "c"]);
}

#[test]
fn the_index_of_a_foreign_tree_is_kept_in_the_cache() {
    let fixture = Fixture::new(&[
        ("kernel/a.ko", &module(&["depends="])),
        ("kernel/b.ko", &module(&["depends=a"])),
    ]);
    let cache = fixture.cache();
    for _ in 0..2 {
        let tree = ModuleTree::open_indexed(&cache, &fixture.dir()).unwrap();
        assert_eq!(tree.resolve(&["b"], &[]).unwrap().len(), 2);
    }
    assert!(
        !fixture.dir().join("modules.dep").exists(),
        "the tree was written to"
    );
    assert_eq!(
        fs::read_dir(cache.root().join("indexes")).unwrap().count(),
        1
    );
}

#[test]
fn a_directory_without_modules_is_no_tree() {
    let fixture = Fixture::new(&[("README", b"nothing")]);
    let opened = ModuleTree::open(&fixture.dir());
    assert!(matches!(opened, Err(ModulesError::NotATree(_))));
    let opened = ModuleTree::open_indexed(&fixture.cache(), &fixture.dir());
    assert!(matches!(opened, Err(ModulesError::NotATree(_))));
    assert!(ModuleTree::open(Path::new("/no/such/tree")).is_err());
}
