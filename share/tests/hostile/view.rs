//! What a view hides is not to be found.

use std::fs;
use std::path::Path;

use share::wire::{self, Opcode, ROOT_ID};
use share::{Options, Readers, Share, View};
use zerocopy::IntoBytes;

use crate::guest::{Guest, some_limits};

/// All that a guest can learn of an inode, whether it was told of it or not.
fn learn(guest: &mut Guest<'_>, node: u64) -> Vec<u8> {
    let open = wire::OpenIn::default();
    let read = wire::ReadIn {
        size: 1 << 16,
        ..wire::ReadIn::default()
    };
    let xattr = wire::GetxattrIn {
        size: 1 << 10,
        padding: 0,
    };
    let link = wire::LinkIn { oldnodeid: node };
    let mut learned = Vec::new();
    for (opcode, body) in [
        (Opcode::Getattr, [&[0; 16][..], b""]),
        (Opcode::Readlink, [b"", b""]),
        (Opcode::Readdir, [read.as_bytes(), b""]),
        (Opcode::Readdirplus, [read.as_bytes(), b""]),
        (Opcode::Listxattr, [xattr.as_bytes(), b""]),
        (Opcode::Getxattr, [xattr.as_bytes(), b"user.secret\0"]),
        (Opcode::Link, [link.as_bytes(), b"link\0"]),
        (Opcode::Lookup, [b"secret\0", b""]),
        (Opcode::Lookup, [b"below\0", b""]),
    ] {
        learned.extend(guest.ask(opcode, node, &body).unwrap_or_default());
    }
    for opcode in [Opcode::Open, Opcode::Opendir] {
        let opened = guest.get::<wire::OpenOut>(opcode, node, &[open.as_bytes()]);
        let Ok(wire::OpenOut { fh, .. }) = opened else {
            continue;
        };
        let read = wire::ReadIn { fh, ..read };
        for opcode in [Opcode::Read, Opcode::Readdir, Opcode::Readdirplus] {
            learned.extend(
                guest
                    .ask(opcode, node, &[read.as_bytes()])
                    .unwrap_or_default(),
            );
        }
    }
    learned
}

#[test]
fn nothing_that_a_view_hides_is_in_any_reply() {
    const CONTENT: &[u8] = b"hidden content";
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    for directory in ["shown", "shown/passed", "secret", "secret/below"] {
        fs::create_dir(at(directory)).unwrap();
    }
    for file in ["secret/below/hidden name", "shown/secret", "shown/open"] {
        fs::write(at(file), CONTENT).unwrap();
    }
    fs::write(at("shown/open"), "shown content").unwrap();
    let mut closed = fs::metadata(at("shown/secret")).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut closed, 0o640);
    fs::set_permissions(at("shown/secret"), closed).unwrap();
    fs::hard_link(at("secret/below/hidden name"), at("shown/hidden name")).unwrap();
    let mut view = View::default();
    view.show(Path::new("/shown"), Readers::Everybody);
    view.hide(Path::new("/secret/below/hidden name"));
    let options = Options {
        limits: some_limits(),
        ..Options::default()
    };
    let share = Share::open_view(dir.path(), options, view).unwrap();
    let mut guest = Guest::new(&share);
    let mut learned = Vec::new();
    for _ in 0..3 {
        for node in (0..50).chain([u64::MAX, 1 << 63]) {
            learned.extend(learn(&mut guest, node));
        }
    }
    let contains = |bytes: &[u8]| learned.windows(bytes.len()).any(|window| window == bytes);
    assert!(contains(b"shown content") && contains(b"passed"));
    for hidden in [CONTENT, b"hidden name", b"secret"] {
        assert!(!contains(hidden), "{}", String::from_utf8_lossy(hidden));
    }
    assert!(guest.lookup(ROOT_ID, c"secret").is_err());
    assert!(guest.lookup(ROOT_ID, c"shown").is_ok());
}
