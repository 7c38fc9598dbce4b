//! Names and directories at their limits.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use share::{Limits, Options};

use crate::mount::Mounted;

#[test]
fn a_hundred_thousand_files_in_a_directory_are_listed_once_each() {
    const FILES: usize = 100_000;
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    let dir = mounted.source.join("many");
    fs::create_dir(&dir).unwrap();
    for number in 0..FILES {
        File::create(dir.join(format!("file-{number}"))).unwrap();
    }
    let listed: Vec<_> = fs::read_dir(mounted.at.join("many"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .collect();
    assert_eq!(listed.len(), FILES);
    let names: BTreeSet<_> = listed.iter().map(fs::DirEntry::file_name).collect();
    assert_eq!(names.len(), FILES);
    for entry in listed.iter().step_by(1000) {
        assert_eq!(entry.metadata().unwrap().len(), 0);
    }
    let (inodes, descriptors, _) = mounted.share.usage();
    assert!(inodes <= FILES + 2, "{inodes} inodes");
    assert!(
        descriptors < 1000,
        "{descriptors} descriptors for a listing"
    );
}

#[test]
fn names_are_bytes_and_as_long_as_they_may_be() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    let longest = [b'n'; 255];
    for name in [
        &b"\xff\xfe not UTF-8 \x80"[..],
        &longest,
        b" ",
        b"...",
        b"new\nline",
        b"\xe2\x82\xac",
    ] {
        let name = OsStr::from_bytes(name);
        fs::write(mounted.at.join(name), name.as_bytes()).unwrap();
        assert_eq!(
            fs::read(mounted.source.join(name)).unwrap(),
            name.as_bytes()
        );
        let listed = fs::read_dir(&mounted.at).unwrap();
        assert!(
            listed
                .into_iter()
                .any(|entry| entry.unwrap().file_name() == name)
        );
        fs::remove_file(mounted.at.join(name)).unwrap();
    }
    let too_long = OsStr::from_bytes(&[b'n'; 256]);
    let error = fs::write(mounted.at.join(too_long), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
}

#[test]
fn more_files_than_descriptors_are_found_again_by_their_names() {
    let limits = Limits {
        descriptors: 64,
        ..Limits::default()
    };
    let options = Options {
        limits,
        ..Options::default()
    };
    let Some(mounted) = Mounted::new(options) else {
        return;
    };
    let path = |number: usize| format!("{}/{}/{number}", number % 7, number % 11);
    for number in 0..1000 {
        let path = mounted.at.join(path(number));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, number.to_string()).unwrap();
    }
    // Directories above all of them move away and back meanwhile.
    fs::rename(mounted.at.join("3"), mounted.at.join("moved")).unwrap();
    fs::rename(mounted.at.join("moved/5"), mounted.at.join("moved/five")).unwrap();
    fs::rename(mounted.at.join("moved/five"), mounted.at.join("moved/5")).unwrap();
    fs::rename(mounted.at.join("moved"), mounted.at.join("3")).unwrap();
    for number in (0..1000).rev() {
        let content = fs::read_to_string(mounted.at.join(path(number))).unwrap();
        assert_eq!(content, number.to_string());
    }
    let (inodes, descriptors, _) = mounted.share.usage();
    assert!(inodes > 1000, "{inodes} inodes");
    assert!(descriptors <= 64 + 8 + 64, "{descriptors} descriptors");
}

#[test]
fn a_directory_that_changes_while_it_is_listed_shows_what_stays() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    for number in 0..2000 {
        File::create(mounted.source.join(format!("stays-{number}"))).unwrap();
        File::create(mounted.source.join(format!("goes-{number}"))).unwrap();
    }
    let mut listing = fs::read_dir(&mounted.at).unwrap();
    let mut seen = BTreeSet::new();
    for entry in listing.by_ref().take(100) {
        seen.insert(entry.unwrap().file_name().into_string().unwrap());
    }
    for number in 0..2000 {
        fs::remove_file(mounted.source.join(format!("goes-{number}"))).unwrap();
    }
    seen.extend(listing.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
    for number in 0..2000 {
        assert!(seen.contains(&format!("stays-{number}")), "{number}");
    }
}

#[test]
fn an_inode_has_one_number_under_all_its_names() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    fs::write(mounted.at.join("one"), "").unwrap();
    fs::hard_link(mounted.at.join("one"), mounted.at.join("two")).unwrap();
    let number = |name| fs::metadata(mounted.at.join(name)).unwrap().ino();
    assert_eq!(number("one"), number("two"));
    let listed = fs::read_dir(&mounted.at).unwrap();
    for entry in listed {
        use std::os::unix::fs::DirEntryExt;
        assert_eq!(entry.unwrap().ino(), number("one"));
    }
}
