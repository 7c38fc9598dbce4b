//! Tests of the order in which kernels are chosen.

use super::*;
use crate::cache::{self, Description};
use crate::elf::tests::kernel;
use crate::modules::tests::module;

struct Fixture {
    dir: tempfile::TempDir,
    cache: Cache,
    places: Places,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let places = Places {
            preference: Preference::at(&dir.path().join("config/mvm/kernel")),
            boot: dir.path().join("boot"),
            modules: dir.path().join("lib/modules"),
        };
        fs::create_dir(&places.boot).unwrap();
        let cache = Cache::at(&dir.path().join("cache")).unwrap();
        Self { dir, cache, places }
    }

    fn cached(&self, version: &str, source: Source, config: &str) -> CachedKernel {
        let stage = self.cache.stage().unwrap();
        fs::write(stage.path().join(cache::VMLINUX), kernel(version)).unwrap();
        fs::write(stage.path().join(cache::CONFIG), config).unwrap();
        stage
            .publish(Description {
                version: version.to_owned(),
                source,
                package: None,
                package_version: None,
            })
            .unwrap()
    }

    fn host(&self, version: &str) {
        let path = self.places.boot.join(format!("vmlinuz-{version}"));
        fs::write(path, kernel(version)).unwrap();
    }

    fn host_modules(&self, version: &str) {
        let tree = self.places.modules.join(version);
        fs::create_dir_all(&tree).unwrap();
        fs::write(tree.join("modules.dep"), "kernel/fuse.ko:\n").unwrap();
    }

    fn select(&self, named: Option<&str>, role: Role) -> Result<Option<Kernel>, SelectError> {
        select(&self.cache, &self.places, named.map(Path::new), role)
    }

    /// Version and origin of what is chosen for a machine.
    fn machine(&self) -> Option<(String, Origin)> {
        let kernel = self.select(None, Role::Machine).unwrap()?;
        Some((kernel.version.unwrap(), kernel.origin))
    }
}

#[test]
fn each_source_gives_way_to_the_one_before_it() {
    let fixture = Fixture::new();
    let chosen = |version: &str, origin| Some((version.to_owned(), origin));
    assert_eq!(fixture.machine(), None);
    fixture.cached("7.0.0", Source::Added, "");
    assert_eq!(fixture.machine(), None, "an added kernel is not a default");
    fixture.host("6.5.0");
    assert_eq!(fixture.machine(), None, "the host's kernel has no modules");
    fixture.host_modules("6.5.0");
    assert_eq!(fixture.machine(), chosen("6.5.0", Origin::Host));
    fixture.cached("6.1.0", Source::Fetched, "");
    fixture.cached("6.12.0", Source::Fetched, "");
    assert_eq!(fixture.machine(), chosen("6.12.0", Origin::Fetched));
    fixture.cached("6.3.0-mvm", Source::Built, "");
    assert_eq!(fixture.machine(), chosen("6.3.0-mvm", Origin::Built));
    fixture.places.preference.set(Some("6.1.0")).unwrap();
    assert_eq!(fixture.machine(), chosen("6.1.0", Origin::Configured));
    let named = fixture.select(Some("7.0.0"), Role::Machine).unwrap();
    assert_eq!(named.unwrap().origin, Origin::Named);
    fixture.places.preference.set(None).unwrap();
    assert_eq!(fixture.machine(), chosen("6.3.0-mvm", Origin::Built));
}

#[test]
fn the_outer_linux_needs_a_kernel_with_kvm_and_9p() {
    let fixture = Fixture::new();
    fixture.cached("6.12.0-cloud", Source::Fetched, "CONFIG_64BIT=y\n");
    assert!(fixture.select(None, Role::Outer).unwrap().is_none());
    fixture.cached("6.1.0-mvm", Source::Fetched, crate::build::FRAGMENT);
    let kernel = fixture.select(None, Role::Outer).unwrap().unwrap();
    assert_eq!(kernel.version.as_deref(), Some("6.1.0-mvm"));
}

#[test]
fn a_preferred_kernel_that_is_gone_is_an_error_that_names_the_setting() {
    let fixture = Fixture::new();
    fixture.cached("6.1.0", Source::Built, "");
    fixture.places.preference.set(Some("6.99")).unwrap();
    let error = fixture.select(None, Role::Machine).unwrap_err().to_string();
    assert!(error.contains("6.99"), "{error}");
    assert!(error.contains("config/mvm/kernel"), "{error}");
}

#[test]
fn a_named_file_wins_over_a_cached_name_and_must_be_a_kernel() {
    let fixture = Fixture::new();
    let path = fixture.dir.path().join("vmlinux");
    fs::write(&path, kernel("6.9.9")).unwrap();
    let chosen = fixture
        .select(path.to_str(), Role::Machine)
        .unwrap()
        .unwrap();
    assert_eq!(chosen.vmlinux, path);
    assert_eq!(chosen.origin, Origin::Named);
    assert!(chosen.modules.is_none());
    fs::write(&path, "no kernel").unwrap();
    assert!(fixture.select(path.to_str(), Role::Machine).is_err());
    assert!(fixture.select(Some("no-such"), Role::Machine).is_err());
}

#[test]
fn modules_are_found_beside_a_kernel_file() {
    for below in ["boot/../lib/modules/6.9.9", "boot/modules"] {
        let fixture = Fixture::new();
        let root = fixture.dir.path().join("unpacked");
        let tree = root.join(below);
        fs::create_dir_all(root.join("boot")).unwrap();
        fs::create_dir_all(tree.join("kernel")).unwrap();
        fs::write(tree.join("kernel/fuse.ko"), module(&["depends="])).unwrap();
        let path = root.join("boot/vmlinuz-6.9.9");
        fs::write(&path, kernel("6.9.9")).unwrap();
        let chosen = fixture
            .select(path.to_str(), Role::Machine)
            .unwrap()
            .unwrap();
        let modules = chosen.modules.unwrap_or_else(|| panic!("none in {below}"));
        assert!(modules.has("fuse"));
    }
}

#[test]
fn a_broken_host_kernel_is_passed_over() {
    let fixture = Fixture::new();
    fixture.host("6.1.0");
    fixture.host_modules("6.1.0");
    fs::write(fixture.places.boot.join("vmlinuz-6.9.0"), "truncated").unwrap();
    fixture.host_modules("6.9.0");
    assert_eq!(fixture.machine(), Some(("6.1.0".to_owned(), Origin::Host)));
    let found = host_kernels(&fixture.cache, &fixture.places);
    let states: Vec<bool> = found.iter().map(|(_, bootable)| bootable.is_ok()).collect();
    assert_eq!(states, [false, true]);
}
