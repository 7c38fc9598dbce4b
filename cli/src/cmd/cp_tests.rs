//! Copies between this host and an agent that is played by a thread.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::thread::{self, JoinHandle};

use tempfile::TempDir;

use super::*;

/// A host's directory and a machine's.
struct Scene(TempDir);

impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(scene.path("host/tree/sub")).unwrap();
        fs::write(scene.path("host/tree/sub/file"), "from the host").unwrap();
        fs::create_dir_all(scene.path("machine/tree/sub")).unwrap();
        fs::write(scene.path("machine/tree/sub/file"), "from the machine").unwrap();
        scene
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn host(&self, name: &str) -> String {
        self.path("host").join(name).to_str().unwrap().to_owned()
    }

    /// Runs the verb against an agent in this machine's directory.
    fn cp(&self, from: &str, to: &str) -> Result<ExitCode> {
        let root = fs::File::open(self.path("machine")).unwrap();
        cp_with(from, to, move |stream| honest(&stream, &root)).0
    }
}

/// Runs the verb against `agent`; what that came to is the second result.
fn cp_with(
    from: &str,
    to: &str,
    agent: impl FnOnce(UnixStream) -> io::Result<()> + Send + 'static,
) -> (Result<ExitCode>, io::Result<()>) {
    let args = CpArgs {
        archive: false,
        follow_link: false,
        quiet: true,
        from: from.into(),
        to: to.into(),
    };
    let playing: std::cell::Cell<Option<JoinHandle<io::Result<()>>>> = None.into();
    let agent = std::cell::Cell::new(Some(agent));
    let result = run(&args, |name| {
        assert_eq!(name, "box");
        let (ours, theirs) = UnixStream::pair()?;
        let agent = agent.take().expect("one connection");
        playing.set(Some(thread::spawn(move || agent(theirs))));
        Ok(ours)
    });
    let played = playing
        .take()
        .map_or(Ok(()), |thread| thread.join().unwrap());
    (result, played)
}

/// What the agent of a machine does.
fn honest(stream: &UnixStream, root: &fs::File) -> io::Result<()> {
    use std::os::fd::AsFd;
    let root = Root::Tree(root.as_fd());
    match protocol::receive(stream)? {
        Some(Open::Pack(request)) => {
            let mut out = ChunkWriter::new(stream);
            let options = PackOptions {
                name: request.name,
                follow: request.follow,
                attributes: request.attributes,
            };
            let packed = archive::pack(root, &request.path, &options, &mut out);
            out.end(packed.map_err(|error| error.sentence()))?;
            Ok(())
        }
        Some(Open::Unpack(request)) => {
            let chunks = ChunkReader::new(stream, |note| panic!("a note for nobody: {note}"));
            let policy = Policy {
                owned: request.owned,
                devices: true,
            };
            let (path, landing) = (&request.path, &request.landing);
            let done = archive::unpack(root, path, landing, policy, chunks, &mut |_| {});
            let done = done.map(|_| ()).map_err(|error| error.sentence());
            protocol::send(stream, &FromUnpack::Done(done))?;
            io::copy(&mut &*stream, &mut io::sink())?;
            Ok(())
        }
        other => panic!("not asked for: {other:?}"),
    }
}

fn is(code: Result<ExitCode>, expected: u8) -> bool {
    format!("{:?}", code.unwrap()) == format!("{:?}", ExitCode::from(expected))
}

fn content(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn trees_are_copied_both_ways() {
    let scene = Scene::new();
    assert!(is(scene.cp("box:/tree", &scene.host("fetched")), 0));
    assert!(is(scene.cp(&scene.host("tree"), "box:sent"), 0));
    assert!(is(scene.cp(&scene.host("tree"), "box:/"), 0));
    assert_eq!(
        content(&scene.path("host/fetched/sub/file")),
        "from the machine"
    );
    assert_eq!(
        content(&scene.path("machine/sent/sub/file")),
        "from the host"
    );
    assert_eq!(
        content(&scene.path("machine/tree/sub/file")),
        "from the host"
    );
}

#[test]
fn what_fails_on_either_side_is_a_failure_here() {
    let scene = Scene::new();
    let missing = scene.host("missing/new");
    for (from, to) in [
        ("box:/missing", scene.host("new").as_str()),
        ("box:/tree", &missing),
        (&missing, "box:/tree"),
        (&scene.host("tree"), "box:/missing/new"),
        (&scene.host("tree"), "box:/tree/sub/file"),
    ] {
        assert!(is(scene.cp(from, to), 1), "{from} to {to}");
    }
    assert!(!scene.path("host/new").exists());
    assert!(!scene.path("machine/missing").exists());
}

#[test]
fn a_machine_that_refuses_early_is_heard_while_much_is_still_to_be_sent() {
    let scene = Scene::new();
    let large = fs::File::create(scene.path("host/large")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&large, &vec![1; 8 << 20], 0).unwrap();
    let (code, played) = cp_with(&scene.host("large"), "box:/", |stream| {
        let _: Option<Open> = protocol::receive(&stream)?;
        let why = "the disk is full \x1b[2J".to_owned();
        protocol::send(&stream, &FromUnpack::Done(Err(why)))?;
        io::copy(&mut &stream, &mut io::sink())?;
        Ok(())
    });
    assert!(is(code, 1));
    played.unwrap();
}

#[test]
fn a_machine_that_says_nothing_sensible_or_ends_is_a_failure_and_leaves_nothing() {
    let scene = Scene::new();
    let host = scene.host("tree/new");
    let tree = scene.host("tree");
    for answer in [
        &b""[..],
        b"\xff\xff\xff\xff",
        b"\0\0\0\0\xff\xff\xff\xff",
        &[7; 5000],
    ] {
        for (from, to) in [("box:/x", host.as_str()), (tree.as_str(), "box:/x")] {
            let answer = answer.to_vec();
            let (code, _) = cp_with(from, to, move |mut stream| {
                let _: Option<Open> = protocol::receive(&stream)?;
                stream.write_all(&answer)?;
                stream.shutdown(Shutdown::Write)?;
                io::copy(&mut stream, &mut io::sink())?;
                Ok(())
            });
            assert!(is(code, 1), "{from} to {to}");
            assert!(!Path::new(&host).exists());
        }
    }
}

#[test]
fn a_machine_that_is_lost_midway_leaves_no_half_file() {
    let scene = Scene::new();
    fs::write(scene.path("machine/large"), vec![1; 4 << 20]).unwrap();
    let root = fs::File::open(scene.path("machine")).unwrap();
    let (code, _) = cp_with("box:/large", &scene.host("new"), move |stream| {
        let (ours, theirs) = UnixStream::pair()?;
        // A relay that passes one MiB on.
        let agent = thread::spawn(move || honest(&theirs, &root));
        let open: Option<Open> = protocol::receive(&stream)?;
        protocol::send(&ours, &open.expect("a request"))?;
        io::copy(&mut (&ours).take(1 << 20), &mut &stream)?;
        drop((ours, stream));
        let _ = agent.join();
        Ok(())
    });
    assert!(is(code, 1));
    assert!(!scene.path("host/new").exists());
}

#[test]
fn a_command_line_that_makes_no_sense_reaches_no_machine() {
    for (from, to) in [
        ("a", "b"),
        ("-", "b"),
        ("-", "-"),
        ("a", "-"),
        ("box:a", "other:b"),
        ("box:", "b"),
        ("a", "box:"),
    ] {
        let (result, _) = cp_with(from, to, |_| panic!("reached"));
        let error = result.expect_err(from).to_string();
        assert!(error.contains("machine"), "{error}");
    }
}

#[test]
fn a_path_in_a_machine_has_a_name_before_its_colon() {
    let machine = |name: &str, path: &str| End::Machine {
        name: name.to_owned(),
        path: path.into(),
    };
    for (text, end) in [
        ("-", End::Stream),
        ("box:/etc", machine("box", "/etc")),
        ("box:", machine("box", "")),
        ("box:a:b", machine("box", "a:b")),
        ("file", End::Host("file".into())),
        ("./box:/etc", End::Host("./box:/etc".into())),
        ("/box:/etc", End::Host("/box:/etc".into())),
        ("a/box:/etc", End::Host("a/box:/etc".into())),
        ("..:x", End::Host("..:x".into())),
        (":/etc", End::Host(":/etc".into())),
    ] {
        assert_eq!(End::parse(text.as_bytes()), end, "{text}");
    }
    assert_eq!(End::parse(b"\xff:x"), End::Host(b"\xff:x".to_vec()));
}

#[test]
fn a_copy_is_called_as_what_was_copied() {
    for (path, name) in [
        ("/a/b", Some("b")),
        ("b", Some("b")),
        ("b///", Some("b")),
        ("/a/.b", Some(".b")),
        ("/a/b/.", None),
        ("/a/b/..", None),
        (".", None),
        ("..", None),
        ("/", None),
        ("/.", None),
        ("", None),
    ] {
        let name = name.map(|name| name.as_bytes().to_vec());
        assert_eq!(base_name(path.as_bytes()), name, "{path}");
    }
}
