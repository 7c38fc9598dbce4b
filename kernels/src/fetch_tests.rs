//! Tests of fetching, through a package client that is a shell script.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::bzimage::tests::wrap;
use crate::deb::tests::package;
use crate::elf::tests::kernel;
use crate::modules::tests::module;
use crate::progress::Silent;

const RELEASE: &str = "6.1.0-56-cloud-amd64";
const PACKAGE: &str = "linux-image-6.1.0-56-cloud-amd64";

/// Knows one metapackage once its lists are there, and "downloads" what lies beside it.
const APT_CACHE: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "cache $*" >> "$here/log"
[ -e "$here/lists-are-there" ] || { echo "E: No packages found" >&2; exit 100; }
for name; do :; done
case " $* " in
*" show "*) printf 'Package: %s\nVersion: %s\n' "$name" "$(cat "$here/version")"; exit 0 ;;
esac
case $name in
linux-image-cloud-amd64)
    printf 'linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n' ;;
linux-image-6.1.0-56-cloud-amd64)
    printf '%s\n  Depends: kmod\n |Depends: linux-base\n' "$name"
    [ -e "$here/linux-modules-6.1.0-56-cloud-amd64.deb" ] &&
        echo '  Depends: linux-modules-6.1.0-56-cloud-amd64' ;;
linux-modules-*) echo "$name" ;;
*) echo "E: No packages found" >&2; exit 100 ;;
esac
exit 0
"#;

const APT_GET: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "get $*" >> "$here/log"
for name; do :; done
case " $* " in
*" update "*) touch "$here/lists-are-there" ;;
*" download "*)
    echo "dlstatus:1:50.0000:Retrieving file 1 of 1"
    if [ -e "$here/breaks" ]; then
        head -c 100 "$here/$name.deb" > "${name}_$(sed s/:/%3a/ "$here/version")_amd64.deb"
        echo "E: Failed to fetch: Connection reset" >&2
        exit 100
    fi
    cp "$here/$name.deb" "${name}_$(sed s/:/%3a/ "$here/version")_amd64.deb" ;;
*) exit 1 ;;
esac
"#;

struct Fixture {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("apt-cache", APT_CACHE), ("apt-get", APT_GET)] {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let cache = Cache::at(&dir.path().join("cache")).unwrap();
        let fixture = Self { dir, cache };
        fixture.offer(PACKAGE, &image_package());
        fixture.touch("lists-are-there");
        fixture.offer_version("1:6.1");
        fixture
    }

    fn offer(&self, name: &str, deb: &[u8]) {
        fs::write(self.dir.path().join(format!("{name}.deb")), deb).unwrap();
    }

    fn offer_version(&self, version: &str) {
        fs::write(self.dir.path().join("version"), version).unwrap();
    }

    fn touch(&self, name: &str) {
        fs::write(self.dir.path().join(name), "").unwrap();
    }

    fn fetch(&self, kind: &Kind) -> Result<CachedKernel, FetchError> {
        fetch_with(
            Client::in_dir(self.dir.path()),
            &self.cache,
            kind,
            Consent::None,
            &Silent,
        )
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// What the cache holds beside locks and package lists.
    fn left_behind(&self) -> Vec<String> {
        fs::read_dir(self.cache.root())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with(".lock-") && name != "apt")
            .collect()
    }
}

fn vmlinuz() -> Vec<u8> {
    let elf = kernel(RELEASE);
    let mut payload = zstd::stream::encode_all(&*elf, 1).unwrap();
    payload.extend_from_slice(&(elf.len() as u32).to_le_bytes());
    wrap(&payload, RELEASE)
}

fn image_package() -> Vec<u8> {
    package(
        &[
            (&format!("./boot/vmlinuz-{RELEASE}"), &vmlinuz()),
            (&format!("./boot/config-{RELEASE}"), b"CONFIG_64BIT=y\n"),
            (&format!("./boot/System.map-{RELEASE}"), b"not needed"),
            (
                &format!("./lib/modules/{RELEASE}/kernel/fs/fuse.ko"),
                &module(&["depends=virtio-ring"]),
            ),
            (
                &format!("./lib/modules/{RELEASE}/kernel/virtio_ring.ko"),
                &module(&["depends="]),
            ),
            (
                &format!("./lib/modules/{RELEASE}/modules.builtin"),
                b"kernel/fs/ext4.ko\n",
            ),
            (
                "./lib/modules/5.0-other/kernel/other.ko",
                b"not this kernel",
            ),
            ("./usr/share/doc/linux/copyright", b"words"),
        ],
        "xz",
    )
}

#[test]
fn a_metapackage_leads_to_a_kernel_with_its_modules() {
    let fixture = Fixture::new();
    let fetched = fixture.fetch(&Kind::Cloud).unwrap();
    assert_eq!(fetched.metadata.version, RELEASE);
    assert_eq!(fetched.metadata.package.as_deref(), Some(PACKAGE));
    assert_eq!(fetched.metadata.package_version.as_deref(), Some("1:6.1"));
    assert_eq!(fs::read(fetched.vmlinux()).unwrap(), kernel(RELEASE));
    assert_eq!(
        fs::read_to_string(fetched.config().unwrap()).unwrap(),
        "CONFIG_64BIT=y\n"
    );
    let tree = modules::ModuleTree::open(&fetched.modules().unwrap()).unwrap();
    let names: Vec<String> = tree
        .resolve(&["fuse", "ext4"], &[])
        .unwrap()
        .into_iter()
        .map(|module| module.name)
        .collect();
    assert_eq!(names, ["virtio_ring", "fuse"]);
    let mut files: Vec<String> = fs::read_dir(&fetched.dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(files, ["config", "kernel.json", "modules", "vmlinux"]);
}

#[test]
fn modules_in_a_package_of_their_own_are_fetched_too() {
    let fixture = Fixture::new();
    let image = package(&[(&format!("./boot/vmlinuz-{RELEASE}"), &vmlinuz())], "zst");
    fixture.offer(PACKAGE, &image);
    let modules = package(
        &[(
            &format!("./usr/lib/modules/{RELEASE}/kernel/virtio_ring.ko"),
            &module(&["depends="]),
        )],
        "zst",
    );
    fixture.offer("linux-modules-6.1.0-56-cloud-amd64", &modules);
    let fetched = fixture.fetch(&Kind::Cloud).unwrap();
    let tree = modules::ModuleTree::open(&fetched.modules().unwrap()).unwrap();
    assert!(tree.has("virtio-ring"));
}

#[test]
fn a_kernel_that_is_there_is_not_downloaded_again() {
    let fixture = Fixture::new();
    let first = fixture.fetch(&Kind::Cloud).unwrap();
    let second = fixture.fetch(&Kind::Package(PACKAGE.to_owned())).unwrap();
    assert_eq!(first.id, second.id);
    assert_eq!(fixture.log().matches("download").count(), 1);
}

#[test]
fn a_newer_build_of_the_same_package_is_fetched() {
    let fixture = Fixture::new();
    let first = fixture.fetch(&Kind::Cloud).unwrap();
    fixture.offer_version("1:6.2");
    let second = fixture.fetch(&Kind::Cloud).unwrap();
    assert_eq!(fixture.log().matches("download").count(), 2);
    // The script offers the same kernel in it, which stays the one it was.
    assert_eq!(first.id, second.id);
}

#[test]
fn a_download_that_breaks_leaves_nothing() {
    let fixture = Fixture::new();
    fixture.touch("breaks");
    let error = fixture.fetch(&Kind::Cloud).unwrap_err();
    assert!(error.to_string().contains("Connection reset"), "{error}");
    assert_eq!(fixture.left_behind(), [""; 0]);
}

#[test]
fn a_damaged_package_leaves_nothing() {
    let fixture = Fixture::new();
    let whole = image_package();
    for len in (0..whole.len() - 1).step_by(whole.len() / 16) {
        fixture.offer(PACKAGE, &whole[..len]);
        assert!(fixture.fetch(&Kind::Cloud).is_err(), "{len} bytes");
        assert_eq!(fixture.left_behind(), [""; 0], "{len} bytes");
    }
}

#[test]
fn a_package_without_a_kernel_is_refused() {
    let fixture = Fixture::new();
    fixture.offer(PACKAGE, &package(&[("./usr/bin/true", b"x")], "xz"));
    let error = fixture.fetch(&Kind::Cloud).unwrap_err();
    assert!(
        matches!(&error, FetchError::NoKernel(name) if name == PACKAGE),
        "{error}"
    );
    assert_eq!(fixture.left_behind(), [""; 0]);
}

#[test]
fn missing_package_lists_are_made_up_for_by_private_ones() {
    let fixture = Fixture::new();
    fs::remove_file(fixture.dir.path().join("lists-are-there")).unwrap();
    fixture.fetch(&Kind::Cloud).unwrap();
    let log = fixture.log();
    let update = log
        .lines()
        .find(|line| line.ends_with("update"))
        .unwrap_or_else(|| panic!("no update in {log}"));
    let lists = fixture.cache.root().join("apt/lists/");
    assert!(
        update.contains(&format!("Dir::State::lists={}", lists.display())),
        "the system's lists were touched: {update}"
    );
}

#[test]
fn an_unknown_package_is_named() {
    let fixture = Fixture::new();
    let error = fixture
        .fetch(&Kind::Package("linux-image-none".to_owned()))
        .unwrap_err();
    assert!(error.to_string().contains("linux-image-none"), "{error}");
    assert_eq!(fixture.left_behind(), [""; 0]);
}

#[test]
fn a_name_that_is_an_option_reaches_no_client() {
    let fixture = Fixture::new();
    for name in ["-oDir::Etc=/tmp", "--help", "a b", "", "A/../b"] {
        let error = fixture.fetch(&Kind::Package(name.to_owned())).unwrap_err();
        assert!(
            matches!(error, FetchError::Package(PackageError::BadName(_))),
            "{name:?}: {error}"
        );
    }
    assert_eq!(fixture.log(), "");
}

#[test]
fn only_the_parts_of_a_kernel_have_a_place() {
    for (path, expected) in [
        ("boot/vmlinuz-6.1", Some(VMLINUZ)),
        ("boot/config-6.1", Some("config")),
        ("boot/vmlinuz-../x", None),
        ("boot/vmlinuz-", None),
        ("boot/grub/grub.cfg", None),
        ("lib/modules/6.1/kernel/a.ko", Some("modules/kernel/a.ko")),
        ("usr/lib/modules/6.1/a.ko", Some("modules/a.ko")),
        ("lib/modules/6.1", None),
        ("lib/modules/evil name/a.ko", None),
        ("etc/passwd", None),
    ] {
        let found = place(Path::new(path)).map(|(_, target)| target);
        assert_eq!(found.as_deref(), expected.map(Path::new), "{path}");
    }
}
