//! Tests of reading archives: what is there, what is hostile, what is cut off.

use super::*;

const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    entries: 100,
};

/// A tar archive that holds `files`.
pub(crate) fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A tar archive with one entry whose name is written as it is, however unsafe.
fn tar_with(name: &[u8], kind: EntryType, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.resize(bytes.len() + 512, b'x');
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

fn names(tar: &[u8], limits: Limits) -> Result<Vec<String>, ArchiveError> {
    let mut names = Vec::new();
    for_each_file(tar, limits, &mut |member, contents| {
        io::copy(contents, &mut io::sink())?;
        names.push(member.path.display().to_string());
        Ok(())
    })?;
    Ok(names)
}

#[test]
fn long_names_of_both_kinds_are_read() {
    let long = format!("lib/{}/file", "d".repeat(180));
    let gnu = tar_of(&[(&long, b"x"), ("short", b"y")]);
    assert_eq!(names(&gnu, LIMITS).unwrap(), [long.as_str(), "short"]);
    let record = {
        let body = format!(" path={long}\n");
        format!("{}{body}", body.len() + 3)
    };
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(EntryType::XHeader);
    header.set_size(record.len() as u64);
    header.set_cksum();
    builder.append(&header, record.as_bytes()).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    builder
        .append_data(&mut header, "cut-name", &b"x"[..])
        .unwrap();
    let pax = builder.into_inner().unwrap();
    assert_eq!(names(&pax, LIMITS).unwrap(), [long.as_str()]);
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["/etc/passwd", "../up", "a/../../up", "..", "a/.."] {
        let error = names(&tar_with(name.as_bytes(), EntryType::Regular, 1), LIMITS).unwrap_err();
        assert!(
            matches!(&error, ArchiveError::UnsafeName(n) if n == name),
            "{name}: {error}"
        );
    }
}

#[test]
fn links_and_devices_are_passed_over() {
    for kind in [
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Block,
        EntryType::Fifo,
        EntryType::Directory,
    ] {
        let found = names(&tar_with(b"boot", kind, 0), LIMITS);
        assert_eq!(found.unwrap_or_default(), [""; 0], "{kind:?}");
    }
}

#[test]
fn what_exceeds_the_limits_ends_the_reading() {
    let many: Vec<(String, &[u8])> = (0..101).map(|i| (format!("f{i}"), &b"x"[..])).collect();
    let many: Vec<(&str, &[u8])> = many.iter().map(|(n, b)| (n.as_str(), *b)).collect();
    let error = names(&tar_of(&many), LIMITS).unwrap_err();
    assert!(error.to_string().contains("100 files"), "{error}");
    let large = vec![0; 2 << 20];
    let error = names(&tar_of(&[("large", &large)]), LIMITS).unwrap_err();
    assert!(error.to_string().contains("1048576 bytes"), "{error}");
    let name = tar_with(b"././@LongLink", EntryType::GNULongName, 1 << 30);
    let error = names(&name, LIMITS).unwrap_err();
    assert!(error.to_string().contains("file name"), "{error}");
}

#[test]
fn a_truncated_archive_is_refused() {
    let tar = tar_of(&[("a", &[1; 3000]), ("b", &[2; 3000])]);
    for len in (1..tar.len() - 1024).step_by(100) {
        // Cut between two entries, it looks complete but for the end marker.
        let whole_entries = len % (512 + 3072) == 0;
        assert!(
            names(&tar[..len], LIMITS).is_err() || whole_entries,
            "{len} of {} bytes were read as a whole archive",
            tar.len()
        );
    }
}

#[test]
fn a_file_is_written_once_and_only_whole() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a/b/c");
    let member = |size| Member {
        path: "a/b/c".into(),
        size,
        is_executable: false,
        modified: 0,
    };
    write_file(&target, &member(3), &mut &b"abc"[..]).unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), b"abc");
    assert!(
        write_file(&target, &member(3), &mut &b"xyz"[..]).is_err(),
        "a second file of one name replaced the first"
    );
    assert!(write_file(&dir.path().join("short"), &member(9), &mut &b"abc"[..]).is_err());
}
