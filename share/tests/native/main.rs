//! Shares on a mount of this machine's own kernel, without any virtual machine. Where FUSE cannot be
//! mounted here, these tests say so and pass.

mod basic;
mod coherence;
mod data;
mod failing;
mod locks;
mod mount;
mod names;
mod owner;
mod pjdfstest;
mod programs;
mod replay;
mod single;
mod view;

use std::path::PathBuf;

use mount::Mounted;
use share::{Cache, Ids, Options, Owner};

/// For trying things by hand: shares `SHARE_SOURCE` at `SHARE_AT` until standard input ends, with
/// `SHARE_ROOTLESS=UID` as that user, with `SHARE_CACHE=strict|private`.
#[test]
#[ignore = "runs until its standard input ends"]
fn serve_by_hand() {
    let path = |name| PathBuf::from(std::env::var_os(name).expect(name));
    let rootless = std::env::var("SHARE_ROOTLESS").ok();
    let id = rootless.map(|id| id.parse().expect("a user's number"));
    let cache = match std::env::var("SHARE_CACHE").as_deref() {
        Ok("strict") => Cache::Strict,
        Ok("private") => Cache::Private,
        _ => Cache::Auto,
    };
    let options = Options {
        cache,
        owner: Owner::Mapped(Ids { uid: 0, gid: 0 }),
        ..Options::default()
    };
    let ids = id.map(|id| (id, id));
    let mounted = Mounted::of(&path("SHARE_SOURCE"), &path("SHARE_AT"), options, ids);
    let mounted = mounted.expect("a mount");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
    println!("{:?}", mounted.share.usage());
}
