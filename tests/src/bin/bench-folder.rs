//! Measures a shared folder beside virtiofs, 9p and a disk of the guest's own: the same work in turns, in guests
//! with the same kernel and root on one host.
//!
//! `tests/bench-folder` builds and runs it. Where machines are emulated, all of it happens in the outer Linux, whose
//! KVM is complete, so mvm's machine and QEMU's are on a par. Prints a table; with `--write` it goes into
//! `docs/benchmarks.md` too. Nothing is asserted: figures depend on the machine, ratios less so.

use std::env;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use tests::{document, host};

#[path = "bench-folder/guests.rs"]
mod guests;
#[path = "bench-folder/material.rs"]
mod material;
#[path = "bench-folder/table.rs"]
mod table;

use guests::{Guest, Place, event_delays};
use material::Size;
use table::{Figures, Goal, Unit};

/// The ways to files, mvm's first, and where each is in its guest.
const WAYS: [(&str, &str); 4] = [
    ("mvm -v", "/share"),
    ("virtiofs", "/tmp/virtiofs"),
    ("9p", "/tmp/9p"),
    ("ext4 in the guest", "/disk"),
];

/// How many events are timed in a round.
const EVENTS: usize = 200;

/// A piece of work: its name, and what the guest does for it, of which the last is timed.
struct Row {
    name: &'static str,
    unit: Unit,
    work: &'static [&'static str],
}

/// In the order in which they are done. `{}` is where the files are, and `#` what one way has for itself there.
fn rows(size: Size) -> Vec<Row> {
    let row = |name, work| Row {
        name,
        unit: Unit::Seconds,
        work,
    };
    let large = Unit::Throughput(size.large());
    vec![
        row("find -ls, cold", &["cold", "find {}/tree"]),
        // Twice, as the caches of a guest are dropped for another way, too.
        row("find -ls, warm", &["find {}/tree", "find {}/tree"]),
        row("git status, cold", &["cold", "git {}/tree"]),
        row("git status, warm", &["git {}/tree", "git {}/tree"]),
        row("unpack small files", &["unpack {}/#"]),
        row("delete them", &["cold", "delete {}/#"]),
        Row {
            unit: large,
            ..row("write one large file", &["write {}/#.large LARGE"])
        },
        Row {
            unit: large,
            ..row("read it, cold", &["cold", "read {}/#.large"])
        },
        row(
            "1,024 reads of 4 KiB at once",
            &["cold", "parallel {}/#.large"],
        ),
        Row {
            unit: Unit::Operations,
            ..row(
                "random 4 KiB, a quarter writes",
                &["cold", "random {}/#.large"],
            )
        },
        row("cargo build", &["delete {}/#.large", "cold", "cargo {}/#"]),
    ]
}

/// What is to be reached.
const GOALS: [Goal; 9] = [
    goal("find -ls, warm", "ext4 in the guest", 1.0 / 1.2),
    goal("git status, warm", "ext4 in the guest", 1.0 / 1.2),
    goal("find -ls, cold", "virtiofs", 1.0),
    goal("git status, cold", "virtiofs", 1.0),
    goal("unpack small files", "virtiofs", 1.0),
    goal("write one large file", "virtiofs", 1.2),
    goal("read it, cold", "virtiofs", 1.2),
    goal("cargo build", "virtiofs", 1.0),
    goal("cargo build", "ext4 in the guest", 1.0 / 1.2),
];

const fn goal(row: &'static str, of: &'static str, times: f64) -> Goal {
    Goal { row, of, times }
}

/// What was asked for.
struct Options {
    write: bool,
    rounds: usize,
    size: Size,
    chosen: Chosen,
}

/// What of it all is measured.
#[derive(Default)]
struct Chosen {
    /// Rows that have one of these in their names, between commas.
    only: String,
    /// Not this way.
    without: String,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Self {
        let mut options = Self {
            write: false,
            rounds: 3,
            size: Size { divisor: 1 },
            chosen: Chosen::default(),
        };
        while let Some(word) = words.next() {
            if word == "--write" {
                options.write = true;
                continue;
            }
            let value = words.next().unwrap_or_default();
            let number = || {
                let value = value.parse().ok();
                value.unwrap_or_else(|| panic!("{word} takes a number"))
            };
            match &*word {
                "--rounds" => options.rounds = number() as usize,
                "--divide" => options.size.divisor = number(),
                "--only" => options.chosen.only = value,
                "--without" => options.chosen.without = value,
                other => panic!(
                    "{other}: the options are --write, --rounds N, --divide N, --only ROW[,ROW] and --without WAY"
                ),
            }
        }
        options
    }
}

impl Chosen {
    fn rows(&self, size: Size) -> Vec<Row> {
        let mut rows = rows(size);
        let is_chosen = |row: &Row| self.only.split(',').any(|part| row.name.contains(part));
        rows.retain(is_chosen);
        rows
    }
}

fn main() {
    let mut words = env::args().skip(1);
    match words.next().as_deref() {
        // Where the guests are.
        Some("measure") => {
            let [image, tree, rounds, divisor] = [(); 4].map(|()| words.next().expect("a word"));
            let [only, without] = [(); 2].map(|()| words.next().expect("a word"));
            let divisor = divisor.parse().expect("a number");
            let rounds = rounds.parse().expect("a number");
            let chosen = Chosen { only, without };
            let size = Size { divisor };
            measure(image.as_ref(), tree.as_ref(), rounds, size, &chosen);
        }
        first => run(&Options::parse(
            first.map(str::to_owned).into_iter().chain(words),
        )),
    }
}

/// Has everything measured, and shows it.
fn run(options: &Options) {
    let material = material::prepare(options.size);
    let own = env::current_exe().expect("a program knows its own file");
    let mut words: Vec<OsString> = vec!["env".into()];
    let mut binary = OsString::from("MVM_TEST_BINARY=");
    binary.push(host::mvm());
    words.extend([binary, own.into(), "measure".into()]);
    words.extend([material.image.into(), material.tree.into()]);
    words.extend([options.rounds.to_string(), options.size.divisor.to_string()].map(Into::into));
    words.extend([&options.chosen.only, &options.chosen.without].map(Into::into));
    let mut command = match host::is_emulated() {
        true => {
            let mut command = Command::new(host::mvm());
            command.args(["accel", "exec", "--"]).args(&words);
            command
        }
        false => {
            let mut command = Command::new("env");
            command.args(&words[1..]);
            command
        }
    };
    let mut measuring = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the measuring can be started");
    let output = measuring.stdout.take().expect("its output is piped");
    let mut figures = Figures::default();
    for line in BufReader::new(output).lines() {
        let line = line.expect("its output is text");
        let mut parts = line.split('\t');
        if let (Some(row), Some(way), Some(seconds)) = (parts.next(), parts.next(), parts.next()) {
            figures.push(row, way, seconds.parse().expect("a number"));
        }
    }
    let ended = measuring.wait().expect("the measuring can be waited for");
    assert!(ended.success(), "the measuring failed: {ended}");
    show(options, &figures);
}

fn show(options: &Options, figures: &Figures) {
    let Options {
        size,
        rounds,
        chosen,
        ..
    } = options;
    let heading = format!(
        "Rounds: {rounds}; {} files are looked at, {} are unpacked, and the large one has {} MiB. Guests have the \
         kernel of `mvm kernel build`, 3 GiB, and as many CPUs as the host; {}.",
        size.tree(),
        size.small(),
        size.large() >> 20,
        match host::is_emulated() {
            true => "the host is the outer Linux of `--accel tcg`",
            false => "hardware KVM",
        },
    );
    let rows = chosen.rows(*size);
    let rows: Vec<_> = rows.iter().map(|row| (row.name, row.unit)).collect();
    let table = table::show(&heading, figures, &rows, &WAYS.map(|(way, _)| way), &GOALS);
    print!("{table}");
    if options.write {
        let path = host::workspace().join("docs/benchmarks.md");
        document::replace(&path, "tests/bench-folder", &table).expect("the table can be written");
    }
}

/// Measures everything, and says each figure in a line: what, how, and seconds.
fn measure(image: &Path, tree: &Path, rounds: usize, size: Size, chosen: &Chosen) {
    eprintln!("unpacking {} files on the host", size.tree());
    let place = Place::new(tree);
    let root = place.path("root.ext4");
    std::fs::copy(image, &root).expect("the image can be copied");
    eprintln!("starting the guests");
    let mut ours = place.mvm(&root);
    let (mut theirs, daemon) = place.qemu(&root);
    eprintln!("unpacking {} files on the guest's disk", size.tree());
    ours.work("extract /disk").expect("the tree is unpacked");
    for guest in [&mut ours, &mut theirs] {
        guest.work("read /bench/small.tar").expect("it is there");
    }
    for round in 1..=rounds {
        for row in chosen.rows(size) {
            // In turns, so that whatever else the host does meets all of them.
            for (way, at) in WAYS {
                if way == chosen.without || way == "virtiofs" && daemon.is_none() {
                    continue;
                }
                let guest = match way {
                    "virtiofs" | "9p" => &mut theirs,
                    _ => &mut ours,
                };
                match timed(guest, &row, at, way, size) {
                    Ok(seconds) => {
                        eprintln!(
                            "round {round} of {rounds}: {}, {way}: {seconds:.4} s",
                            row.name
                        );
                        println!("{}\t{way}\t{seconds}", row.name);
                    }
                    Err(reason) => eprintln!("{}, {way}: {reason}", row.name),
                }
            }
        }
        for (way, at) in WAYS {
            let guest = match way {
                "virtiofs" | "9p" => &mut theirs,
                _ => &mut ours,
            };
            // What a way cannot do leaves nothing.
            let _ = guest.work(&format!("delete {at}/{}", own_name(way)));
        }
        for delay in event_delays(&mut ours, &place, EVENTS) {
            println!("event\t{}\t{delay}", WAYS[0].0);
        }
    }
    ours.end();
    theirs.end();
    drop(daemon);
}

/// What a way has for itself in a folder that several share.
fn own_name(way: &str) -> String {
    way.replace(' ', "-")
}

fn timed(guest: &mut Guest, row: &Row, at: &str, way: &str, size: Size) -> Result<f64, String> {
    let mut seconds = 0.0;
    for work in row.work {
        let work = work
            .replace("{}", at)
            .replace('#', &own_name(way))
            .replace("LARGE", &size.large().to_string());
        seconds = guest.work(&work)?;
    }
    Ok(seconds)
}
