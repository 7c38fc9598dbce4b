//! Tests of the build's steps, with a source package whose Makefile only pretends.
//!
//! They run make and the compiler, as a build does.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::archive::tests::tar_of;
use crate::deb::tests::package;
use crate::progress::Silent;

const APT_CACHE: &str = r#"#!/bin/sh
for name; do :; done
case " $* " in
*" pkgnames "*) printf 'linux-source-6.1\nlinux-source-6.99\nlinux-source-6.9\nlinux-source-6.99-rt\n' ;;
*" show "*) printf 'Version: 6.99.1-1\n' ;;
*" depends "*) echo "$name" ;;
esac
"#;

const APT_GET: &str = r#"#!/bin/sh
here=$(dirname "$0")
for name; do :; done
case " $* " in
*" download "*) cp "$here/$name.deb" "${name}_6.99.1-1_all.deb" ;;
esac
"#;

/// A kernel's Makefile as far as the build sees it.
const MAKEFILE: &str = "\
tinyconfig:
\t@echo '# CONFIG_64BIT is not set' > .config
olddefconfig:
\t@true
vmlinux:
\t@echo '  CC      kernel.o'
\t@env | grep -E '^(KBUILD|ARCH|LOCAL)' | sort
\t@echo 'ELF_ENTRY: .globl _start; _start: hlt' | sed 's/.*: .globl/.globl/' > head.s
\t@gcc -nostdlib -static -Wl,--build-id=none -o vmlinux head.s
\t@mkdir -p include/config
\t@echo 6.99.1$$LOCALVERSION > include/config/kernel.release
";

struct Fixture {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Fixture {
    fn new(makefile: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("apt-cache", APT_CACHE), ("apt-get", APT_GET)] {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let tar = tar_of(&[("linux-source-6.99/Makefile", makefile.as_bytes())]);
        let source = zstd::stream::encode_all(&*tar, 1).unwrap();
        let deb = package(&[("./usr/src/linux-source-6.99.tar.zst", &source)], "xz");
        fs::write(dir.path().join("linux-source-6.99.deb"), deb).unwrap();
        let cache = Cache::at(&dir.path().join("cache")).unwrap();
        Self { dir, cache }
    }

    fn build(&self, extra: &str) -> Result<CachedKernel, BuildError> {
        let options = Options {
            extra: extra.to_owned(),
            ..Options::default()
        };
        build_with(
            Client::in_dir(self.dir.path()),
            &self.cache,
            &options,
            Consent::None,
            &Silent,
        )
    }

    fn log(&self) -> String {
        fs::read_to_string(self.cache.root().join(LOG)).unwrap()
    }

    /// What the cache holds beside locks.
    fn entries(&self) -> Vec<String> {
        fs::read_dir(self.cache.root())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with(".lock-"))
            .collect()
    }
}

#[test]
fn the_newest_source_becomes_a_kernel_with_its_configuration() {
    let fixture = Fixture::new(MAKEFILE);
    let built = fixture.build("CONFIG_EXTRA=y\n").unwrap();
    assert_eq!(built.metadata.version, "6.99.1-mvm");
    assert_eq!(built.metadata.source, Source::Built);
    assert_eq!(built.metadata.package.as_deref(), Some("linux-source-6.99"));
    let config = fs::read_to_string(built.config().unwrap()).unwrap();
    let config = Config::parse(&config);
    assert_eq!(config.value("64BIT"), Some("y"));
    assert_eq!(config.value("EXTRA"), Some("y"));
    let mut files: Vec<String> = fs::read_dir(&built.dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(files, ["config", "kernel.json", "vmlinux"]);
}

#[test]
fn two_builds_of_one_source_are_the_same_kernel() {
    let fixture = Fixture::new(MAKEFILE);
    let first = fixture.build("").unwrap();
    let log = fixture.log();
    assert_eq!(first.id, fixture.build("").unwrap().id);
    assert_eq!(log, fixture.log(), "the environment differs");
    assert!(log.contains("KBUILD_BUILD_USER=mvm"), "{log}");
}

#[test]
fn a_compiler_error_is_shown_and_leaves_only_the_log() {
    let makefile = MAKEFILE.replace("\t@gcc", "\t@echo 'fork.c:7: error: no' >&2; exit 3; gcc");
    let fixture = Fixture::new(&makefile);
    let error = fixture.build("").unwrap_err().to_string();
    assert!(error.contains("fork.c:7: error: no"), "{error}");
    assert!(error.contains("build.log"), "{error}");
    assert_eq!(fixture.entries(), [LOG]);
    assert!(fixture.log().contains("fork.c:7: error: no"));
}

#[test]
fn an_option_that_is_dropped_ends_the_build() {
    let makefile = MAKEFILE.replace("\t@true", "\t@sed -i /CONFIG_WIREGUARD/d .config");
    let fixture = Fixture::new(&makefile);
    let error = fixture.build("").unwrap_err();
    assert!(
        matches!(&error, BuildError::Options(names) if names == "WIREGUARD=y"),
        "{error}"
    );
    assert_eq!(fixture.entries(), [LOG]);
}

#[test]
fn a_kernel_that_lacks_what_machines_need_is_not_kept() {
    let fixture = Fixture::new(MAKEFILE);
    let error = fixture.build("# CONFIG_VSOCKETS is not set\n").unwrap_err();
    assert!(
        matches!(&error, BuildError::Lacks(names) if names.contains("VSOCKETS")),
        "{error}"
    );
    assert_eq!(fixture.entries(), [LOG]);
}

#[test]
fn a_vmlinux_that_is_no_kernel_is_not_kept() {
    let makefile = MAKEFILE.replace("-nostdlib -static", "-nostdlib -shared -fPIC");
    let fixture = Fixture::new(&makefile);
    let error = fixture.build("").unwrap_err();
    assert!(matches!(error, BuildError::Elf(_)), "{error}");
    assert_eq!(fixture.entries(), [LOG]);
}
