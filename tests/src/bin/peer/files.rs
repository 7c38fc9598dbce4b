//! What a folder is measured by, in the guest: each line that is read names a piece of work and where it is done,
//! and is answered with `= SECONDS`, or with `! REASON`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Error, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise, sync};

/// Where a bench's image has what it unpacks and builds.
const MATERIAL: &str = "/bench";

/// How many reads are under way at once in `parallel`, and how long each is.
const READERS: usize = 1024;
const PAGE: u64 = 4096;

/// What is read or written at once in `read` and `write`.
const BLOCK: usize = 1 << 20;

/// `random`: for how long, by how many threads, and of how many operations one is a write.
const SPELL: Duration = Duration::from_secs(5);
const THREADS: u64 = 4;
const WRITES: u64 = 3;

/// Does what standard input asks for.
pub fn serve() -> io::Result<()> {
    super::say("listening");
    for line in io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match work(&words) {
            Ok(passed) => super::say(&format!("= {}", passed.as_secs_f64())),
            Err(error) => super::say(&format!("! {line}: {error}")),
        }
    }
    Ok(())
}

fn work(words: &[&str]) -> io::Result<Duration> {
    match *words {
        ["cold"] => timed(drop_caches),
        ["extract", dir] => timed(|| unpack("tree.tar", dir)),
        ["unpack", dir] => {
            fs::create_dir_all(dir)?;
            timed(|| unpack("small.tar", dir))
        }
        ["delete", dir] => timed(|| run(Command::new("rm").args(["-rf", dir]))),
        ["find", dir] => timed(|| run(Command::new("find").args([dir, "-ls"]))),
        ["git", dir] => timed(|| run(git(dir).args(["status", "--porcelain"]))),
        ["write", file, size] => write(file, number(size)?),
        ["read", file] => read(file),
        ["parallel", file] => parallel(file),
        // Of so many seconds' work, the time of one operation.
        ["random", file] => random(file),
        ["cargo", dir] => cargo(dir),
        ["events", dir] => super::inotify::watch_until(dir, "stop").map(|()| Duration::ZERO),
        _ => Err(Error::other("no such work")),
    }
}

fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

fn number(word: &str) -> io::Result<u64> {
    word.parse().map_err(Error::other)
}

/// Everything is written out, and nothing is in memory any more.
fn drop_caches() -> io::Result<()> {
    sync();
    fs::write("/proc/sys/vm/drop_caches", "3")
}

fn run(command: &mut Command) -> io::Result<()> {
    let ended = command.stdout(Stdio::null()).status()?;
    match ended.success() {
        true => Ok(()),
        false => Err(Error::other(format!("{command:?} ended with {ended}"))),
    }
}

fn unpack(archive: &str, dir: &str) -> io::Result<()> {
    let archive = Path::new(MATERIAL).join(archive);
    run(Command::new("tar").arg("xf").arg(archive).args(["-C", dir]))
}

fn git(dir: &str) -> Command {
    let mut command = Command::new("git");
    command
        .args(["-c", "safe.directory=*", "-C", dir])
        .env("HOME", "/tmp")
        // The index stays as it is, so that each run does the same.
        .env("GIT_OPTIONAL_LOCKS", "0");
    command
}

fn write(file: &str, size: u64) -> io::Result<Duration> {
    let block = vec![0x5a; BLOCK];
    timed(|| {
        let mut to = File::create(file)?;
        for _ in 0..size / BLOCK as u64 {
            to.write_all(&block)?;
        }
        to.sync_all()
    })
}

fn read(file: &str) -> io::Result<Duration> {
    let mut block = vec![0; BLOCK];
    timed(|| {
        let mut from = File::open(file)?;
        while io::Read::read(&mut from, &mut block)? > 0 {}
        Ok(())
    })
}

/// A generator of positions with a fixed seed.
struct Random(u64);

impl Random {
    fn page_of(&mut self, pages: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % pages * PAGE
    }
}

/// Opens a file of which single pages are wanted; says how many it has.
fn open_pages(file: &str) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    fadvise(&file, 0, None, Advice::Random)?;
    let pages = file.metadata()?.len() / PAGE;
    Ok((file, pages.max(1)))
}

fn parallel(file: &str) -> io::Result<Duration> {
    let (file, pages) = open_pages(file)?;
    let mut random = Random(0x9e37_79b9);
    let ready = Barrier::new(READERS + 1);
    thread::scope(|scope| {
        let mut readers = Vec::new();
        for _ in 0..READERS {
            let at = random.page_of(pages);
            let (file, ready) = (&file, &ready);
            let read = move || {
                ready.wait();
                file.read_exact_at(&mut [0; PAGE as usize], at)
            };
            let builder = thread::Builder::new().stack_size(64 << 10);
            readers.push(builder.spawn_scoped(scope, read)?);
        }
        ready.wait();
        timed(|| {
            readers.into_iter().try_for_each(|reader| {
                let ended = reader.join();
                ended.map_err(|_| Error::other("a reader panicked"))?
            })
        })
    })
}

fn random(file: &str) -> io::Result<Duration> {
    let (file, pages) = open_pages(file)?;
    let start = Instant::now();
    let done = thread::scope(|scope| {
        let worker = |seed: u64| {
            let file = &file;
            move || -> io::Result<u64> {
                let mut random = Random(seed);
                let mut page = [7; PAGE as usize];
                let mut done = 0;
                while start.elapsed() < SPELL {
                    let at = random.page_of(pages);
                    match done % (WRITES + 1) {
                        0 => file.write_all_at(&page, at)?,
                        _ => file.read_exact_at(&mut page, at)?,
                    }
                    done += 1;
                }
                Ok(done)
            }
        };
        let workers: Vec<_> = (1..=THREADS)
            .map(|seed| scope.spawn(worker(seed)))
            .collect();
        let ends = workers.into_iter().map(|worker| {
            let ended = worker.join();
            ended.map_err(|_| Error::other("a worker panicked"))?
        });
        ends.sum::<io::Result<u64>>()
    })?;
    file.sync_all()?;
    Ok(start.elapsed().div_f64(done.max(1) as f64))
}

fn cargo(dir: &str) -> io::Result<Duration> {
    fs::create_dir_all(dir)?;
    let material = Path::new(MATERIAL).join("crate");
    run(Command::new("cp").arg("-r").arg(material).arg(dir))?;
    timed(|| {
        run(Command::new("cargo")
            .args(["build", "--quiet", "--offline"])
            .current_dir(Path::new(dir).join("crate"))
            .env("HOME", "/tmp"))
    })
}
