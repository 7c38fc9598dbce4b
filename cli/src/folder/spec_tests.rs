//! What may be typed, what it means, and what is refused.

use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<Volume, VolumeError> {
    Volume::parse(OsStr::new(text))
}

fn volume(host: &str, guest: &str) -> Volume {
    Volume {
        host: host.into(),
        guest: guest.into(),
        read_only: false,
        uid: None,
        gid: None,
        cache: Cache::Auto,
        locking: Locking::Guest,
    }
}

#[test]
fn folders_are_read_as_they_are_written() {
    let plain = volume("/src", "/project");
    for (text, expected) in [
        ("/src:/project", plain.clone()),
        ("/src:/project:", plain.clone()),
        ("/src:/project:rw", plain.clone()),
        ("/src:/project:ro,rw", plain.clone()),
        ("/src:/project:cache=auto", plain.clone()),
        ("/src:/project:locks=guest", plain.clone()),
        ("/src/:/project/", volume("/src/", "/project")),
        ("/src://a//./b/", volume("/src", "/a/b")),
        ("/with:colon:/project", volume("/with:colon", "/project")),
        ("/one:/two:/project:rw", volume("/one:/two", "/project")),
        (
            "/src:/project:ro",
            Volume {
                read_only: true,
                ..plain.clone()
            },
        ),
        (
            "/src:/project:uid=1000,gid=100,cache=strict",
            Volume {
                uid: Some(1000),
                gid: Some(100),
                cache: Cache::Strict,
                ..plain.clone()
            },
        ),
        (
            "/src:/project:cache=private",
            Volume {
                cache: Cache::Private,
                ..plain.clone()
            },
        ),
        (
            "/src:/project:locks=host",
            Volume {
                locking: Locking::Host,
                ..plain.clone()
            },
        ),
    ] {
        assert_eq!(parse(text), Ok(expected), "{text}");
    }
}

#[test]
fn the_host_path_is_relative_to_the_working_directory() {
    let here = std::env::current_dir().unwrap();
    assert_eq!(parse(".:/project").unwrap().host, here);
    assert_eq!(parse("a/b:/project").unwrap().host, here.join("a/b"));
    assert_eq!(parse("..:/project").unwrap().host, here.join(".."));
    assert_eq!(parse("~:/project").unwrap().host, here.join("~"));
}

#[test]
fn what_is_wrong_with_a_folder_is_said() {
    for (text, why) in [
        ("", "such as .:/work (boot messages are shown by --verbose)"),
        (
            "/src",
            "such as .:/work (boot messages are shown by --verbose)",
        ),
        (":/project", "the path on the host is missing"),
        ("/src:", "\"\" is not an absolute path"),
        ("/src:work", "\"work\" is not an absolute path"),
        ("/src:./project:ro", "\"./project\" is not an absolute path"),
        ("/src:ro", "\"ro\" is not an absolute path"),
        ("/src:/", "it is the machine's root"),
        ("/src:/./", "it is the machine's root"),
        ("/src:/a/../b", "it goes upwards"),
        ("/src:/a\0", "it holds a zero byte"),
        ("/s\0rc:/a", "it holds a zero byte"),
        (
            "/src:/project:r",
            "\"r\" is not an option of a folder: ro, rw, uid=N,",
        ),
        ("/src:/project:ro;rw", "\"ro;rw\" is not an option"),
        ("/src:/project:cache=", "\"cache=\" is not an option"),
        (
            "/src:/project:cache=none",
            "\"cache=none\" is not an option",
        ),
        ("/src:/project:locks=", "\"locks=\" is not an option"),
        ("/src:/project:uid=me", "\"me\" is not the number of a user"),
        ("/src:/project:uid=", "\"\" is not the number"),
        ("/src:/project:gid=-1", "\"-1\" is not the number"),
        ("/src:/project:gid=+1", "\"+1\" is not the number"),
        ("/src:/project:uid=4294967295", "is not the number"),
        ("/src:/project:uid=4294967296", "is not the number"),
    ] {
        let error = parse(text).expect_err(text).to_string();
        assert!(error.contains(why), "{text}: {error}");
    }
    let long = format!("/src:/{}", "n".repeat(256));
    assert!(parse(&long).is_err());
    let deep = format!("/src:{}", "/name".repeat(1000));
    assert!(parse(&deep).is_err());
}

#[test]
fn names_that_are_not_text_are_kept() {
    let text = OsStr::from_bytes(b"/s\xff:/g\xfe:ro");
    let volume = Volume::parse(text).unwrap();
    assert_eq!(volume.host.as_os_str().as_bytes(), b"/s\xff");
    assert_eq!(volume.text(), text);
}

proptest! {
    #[test]
    fn what_is_written_back_is_read_as_the_same(
        host in "/[a-z:/ ]{0,20}[a-z]",
        guest in "(/[a-z. ]{3,8}x){1,3}",
        read_only: bool,
        uid in proptest::option::of(0..u32::MAX),
        gid in proptest::option::of(0..u32::MAX),
        cache in 0..3_usize,
        locks: bool,
    ) {
        let locking = if locks { Locking::Host } else { Locking::Guest };
        let cache = [Cache::Auto, Cache::Strict, Cache::Private][cache];
        let volume = Volume { read_only, uid, gid, cache, locking, ..volume(&host, &guest) };
        let read = Volume::parse(&volume.text()).unwrap();
        prop_assert_eq!(&read.guest, &volume.guest);
        prop_assert_eq!((read.read_only, read.uid, read.gid, read.cache), (read_only, uid, gid, cache));
        prop_assert_eq!(read.locking, locking);
        prop_assert_eq!(Volume::parse(&read.text()).unwrap(), read);
    }

    #[test]
    fn whatever_is_typed_is_read_or_refused(text in ".{0,60}") {
        if let Ok(volume) = parse(&text) {
            prop_assert!(volume.host.is_absolute() && volume.guest.is_absolute());
        }
    }
}
