//! Tests of the cache: what is published is whole, what is not leaves nothing.

use std::os::unix::fs::PermissionsExt;

use super::*;
use std::time::SystemTime;

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(&dir.path().join("kernels")).unwrap();
    (dir, cache)
}

fn description(version: &str) -> Description {
    Description {
        version: version.to_owned(),
        source: Source::Added,
        package: None,
        package_version: None,
    }
}

fn publish(cache: &Cache, version: &str, contents: &[u8]) -> CachedKernel {
    let stage = cache.stage().unwrap();
    fs::write(stage.path().join(VMLINUX), contents).unwrap();
    stage.publish(description(version)).unwrap()
}

/// Everything in the cache but lock files.
fn entries(cache: &Cache) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(cache.root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with(".lock-"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_published_kernel_is_named_by_version_and_digest_and_cannot_be_changed() {
    let (_dir, cache) = cache();
    let kernel = publish(&cache, "6.1.0-x", b"kernel");
    // sha256 of "kernel"
    assert_eq!(kernel.id, "6.1.0-x-6923dd1bc046");
    assert_eq!(entries(&cache), [kernel.id.as_str()]);
    let mode = fs::metadata(kernel.vmlinux()).unwrap().permissions().mode();
    assert_eq!(mode & 0o222, 0, "{mode:o}");
    assert_eq!(cache.find(&kernel.id).unwrap().metadata, kernel.metadata);
}

#[test]
fn an_abandoned_stage_leaves_nothing() {
    let (_dir, cache) = cache();
    let stage = cache.stage().unwrap();
    fs::write(stage.path().join(VMLINUX), b"half a kern").unwrap();
    drop(stage);
    assert_eq!(entries(&cache), [""; 0]);
    assert!(cache.kernels().unwrap().is_empty());
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_a_living_one_stages_is_not() {
    let (_dir, cache) = cache();
    let dead = cache.root().join(format!(".stage-{}-1-0", boot()));
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join(VMLINUX), b"half a kern").unwrap();
    let living = cache.stage().unwrap();
    assert!(!dead.exists(), "nobody held its lock");
    let other = cache.stage().unwrap();
    assert!(living.path().exists(), "its lock was held");
    assert_ne!(living.path(), other.path());
}

#[test]
fn what_another_running_kernel_stages_in_the_same_cache_is_left_alone_for_a_day() {
    let (_dir, cache) = cache();
    let elsewhere = cache.root().join(".stage-0123-1-0");
    let long_ago = cache.root().join(".stage-0123-2-0");
    for dir in [&elsewhere, &long_ago] {
        fs::create_dir(dir).unwrap();
    }
    let yesterday = SystemTime::now() - ABANDONED_AFTER * 2;
    File::open(&long_ago)
        .and_then(|dir| dir.set_modified(yesterday))
        .unwrap();
    let _stage = cache.stage().unwrap();
    assert!(elsewhere.exists(), "its lock cannot be seen here");
    assert!(!long_ago.exists(), "nobody works for so long");
}

#[test]
fn the_same_kernel_twice_is_one() {
    let (_dir, cache) = cache();
    let first = publish(&cache, "6.1.0", b"kernel");
    let second = publish(&cache, "6.1.0", b"kernel");
    assert_eq!(first.id, second.id);
    assert_eq!(entries(&cache).len(), 1);
}

#[test]
fn a_stage_without_a_kernel_is_not_published() {
    let (_dir, cache) = cache();
    let stage = cache.stage().unwrap();
    assert!(stage.publish(description("6.1.0")).is_err());
    assert_eq!(entries(&cache), [""; 0]);
}

#[test]
fn kernels_are_listed_newest_first_and_damaged_ones_left_out() {
    let (_dir, cache) = cache();
    publish(&cache, "6.1.9", b"a");
    publish(&cache, "6.12.1", b"b");
    publish(&cache, "6.2.0", b"c");
    for (name, text) in [("6.99-damaged", "{}"), ("6.98-huge", "not json")] {
        let dir = cache.root().join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(METADATA), text).unwrap();
    }
    fs::create_dir(cache.root().join("6.97-empty")).unwrap();
    let versions: Vec<String> = cache
        .kernels()
        .unwrap()
        .into_iter()
        .map(|kernel| kernel.metadata.version)
        .collect();
    assert_eq!(versions, ["6.12.1", "6.2.0", "6.1.9"]);
}

#[test]
fn a_kernel_is_found_by_the_beginning_of_its_name_when_it_is_the_only_one() {
    let (_dir, cache) = cache();
    let old = publish(&cache, "6.1.0", b"a");
    publish(&cache, "6.12.1", b"b");
    assert_eq!(cache.find("6.1.0").unwrap().id, old.id);
    assert!(matches!(
        cache.find("6.1"),
        Err(CacheError::Ambiguous { .. })
    ));
    for name in ["5", "", "..", "/"] {
        assert!(
            matches!(cache.find(name), Err(CacheError::NotFound(_))),
            "{name:?}"
        );
    }
}

#[test]
fn a_removed_kernel_is_gone_and_nothing_else_is() {
    let (_dir, cache) = cache();
    let kernel = publish(&cache, "6.1.0", b"a");
    let other = publish(&cache, "6.12.1", b"b");
    assert_eq!(cache.remove("6.1.0").unwrap(), kernel.id);
    assert_eq!(entries(&cache), [other.id.as_str()]);
    for name in ["..", "../kernels", "6.1.0", "/", "6/../.."] {
        assert!(cache.remove(name).is_err(), "{name}");
    }
    assert_eq!(entries(&cache), [other.id.as_str()]);
}

#[test]
fn a_damaged_kernel_can_be_removed_by_its_name() {
    let (_dir, cache) = cache();
    fs::create_dir(cache.root().join("6.97-empty")).unwrap();
    assert_eq!(cache.remove("6.97-empty").unwrap(), "6.97-empty");
    assert_eq!(entries(&cache), [""; 0]);
}

#[test]
fn a_task_is_done_by_one_at_a_time() {
    use std::sync::atomic::AtomicUsize;
    let (_dir, cache) = cache();
    let inside = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let _lock = cache.exclusive("task").unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two at a time");
                    std::thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                }
            });
        }
    });
}
