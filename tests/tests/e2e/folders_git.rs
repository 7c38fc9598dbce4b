//! A repository that host and guest both work on, while a program in the guest watches it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use tests::host::{self, eventually, run_in};
use tests::process::Running;
use tests::{Guest, Machine, Machines};

/// Each branch has this many directories of this many files. Half of a branch's directories are the other's too, and
/// every file in them is another one there.
const DIRECTORIES: usize = 50;
const FILES: usize = 100;
const SHARED: usize = DIRECTORIES / 2;

/// Where the guest has it.
const AT: &str = "/project";

/// Nobody's own settings, files that somebody else may own, and nothing in the background.
const GIT: &str = "export HOME=/nonexistent GIT_CONFIG_NOSYSTEM=1
    git() { command git -c safe.directory='*' -c gc.auto=0 -c maintenance.auto=false -c user.name=a -c user.email=a@b \"$@\"; }\n";

/// Makes the two branches, a third one that differs from `other` in one file of each directory
/// that all have and in two whole ones, and is on `main` then.
fn make(dir: &Path) {
    let script = format!(
        "{GIT} git init -q -b main .
        fill() {{ for d in $(seq $2 $3); do mkdir -p d$d; for f in $(seq {FILES}); do
            echo $1 $d $f >d$d/f$f; done; done; git add .; git commit -qm $1; }}
        fill main 1 {DIRECTORIES}
        git checkout -q --orphan other; git rm -rq --cached .; rm -r d*
        fill other {} {}
        git checkout -qb few; git rm -rq d{DIRECTORIES}; for d in $(seq {} {}); do echo few >d$d/f1; done; fill few {} {}
        git gc -q; git checkout -q main",
        DIRECTORIES - SHARED + 1,
        2 * DIRECTORIES - SHARED,
        DIRECTORIES - SHARED + 1,
        DIRECTORIES - 1,
        2 * DIRECTORIES,
        2 * DIRECTORIES,
    );
    run_in(dir, &script);
}

/// The directories that both branches have.
fn shared() -> impl Iterator<Item = String> {
    (DIRECTORIES - SHARED + 1..=DIRECTORIES).map(|number| format!("{AT}/d{number}"))
}

/// All that is there besides git's own: what kind it is, how long, of when; and of every tenth file what is in it.
const LOOK: &str = "cd \"$0\" && export TZ=UTC
    find . -name .git -prune -o -exec stat -c '%F %s %y %n' {} + && md5sum d*/f*0";

fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(str::to_owned).collect()
}

fn on_host_now(dir: &Path) -> BTreeSet<String> {
    let mut look = Command::new("sh");
    look.args(["-c", LOOK]).arg(dir);
    let output = Running::start(look, Vec::new()).wait();
    output.expect_code(0);
    lines(&output.text())
}

/// Waits until the guest sees what the host has.
#[track_caller]
fn expect_same(machine: &Machine<'_>, dir: &Path, when: &str) {
    let wanted = on_host_now(dir);
    let mut different = Vec::new();
    let same = host::poll(|| {
        let output = machine.start(&["sh", "-c", LOOK, AT]).wait();
        output.expect_stderr("");
        let found = lines(&output.text());
        different = found.symmetric_difference(&wanted).cloned().collect();
        different.is_empty().then_some(())
    });
    assert!(
        same.is_some(),
        "{when}: {} of {} lines differ, such as {:?}",
        different.len(),
        wanted.len(),
        &different[..different.len().min(6)]
    );
}

/// What was heard: the last event of each name, and whether more happened than could be told.
fn heard(said: &str) -> (BTreeMap<&str, &str>, bool) {
    let events = said.lines().filter_map(|line| line.split_once(' '));
    let last: BTreeMap<_, _> = events.map(|(what, path)| (path, what)).collect();
    // Everything that is watched looks changed then; and what the watcher itself does not read fast enough is
    // dropped by its kernel.
    let overflown = shared().any(|dir| said.contains(&format!("ATTRIB {dir}\n")))
        || said.lines().any(|line| line.starts_with("QUEUE_OVERFLOW"));
    (last, overflown)
}

/// Those of the files, all of which are there now, that nothing was heard of, or last that they are gone.
fn missed(files: impl Iterator<Item = String>, last: &BTreeMap<&str, &str>) -> Vec<String> {
    let is_missed = |path: &String| last.get(path.as_str()).is_none_or(|what| *what == "DELETE");
    files.filter(is_missed).collect()
}

/// Starts a program in the guest that watches the directories that both branches have.
fn watch(machine: &Machine<'_>) -> Running {
    let watched: Vec<_> = shared().collect();
    let mut words = vec!["/tmp/peer", "inotify"];
    words.extend(watched.iter().map(String::as_str));
    let watching = machine.start(&words);
    watching.expect_stdout("listening\n");
    watching
}

/// Ends it when it has heard of all that was done on the host, and gives what it says.
#[track_caller]
fn hear_out(watching: Running, dir: &Path) -> String {
    // Events come in order: what is heard of last was made last.
    let mut made = 0;
    eventually("the watcher hears of a new file", || {
        made += 1;
        let end = format!("d{}/end-{made}", DIRECTORIES - 1);
        run_in(dir, &format!("echo >{end}"));
        watching.said_so_far().contains("/end-").then_some(())
    });
    run_in(dir, &format!("rm d{}/end-*", DIRECTORIES - 1));
    watching.signal(Signal::TERM);
    watching.wait().text()
}

/// Whether this machine has git; its root is the guest's.
fn has_git(test: &str) -> bool {
    let found = Command::new("git").arg("--version").output();
    let has = found.is_ok_and(|output| output.status.success());
    if !has {
        host::skipped(test, "there is no git");
    }
    has
}

#[test]
fn a_checkout_on_the_host_loses_nothing_for_who_reads_and_watches_in_the_guest() {
    if !has_git("a_checkout_on_the_host_loses_nothing_for_who_reads_and_watches_in_the_guest") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    make(dir.path());
    let machines = Machines::new();
    let guest = Guest::of_host(dir.path())
        .option("--no-host-path", ".")
        .option("-u", "root")
        .option("-v", format!("{}:{AT}", dir.path().display()));
    let machine = machines.idle(guest);
    machine.plant_peer();
    expect_same(&machine, dir.path(), "before anything is changed");
    let watching = watch(&machine);
    let reading = machine.start(&[
        "sh",
        "-c",
        "echo reads; while :; do cat $0/d*/f*0; done >/dev/null 2>&1",
        AT,
    ]);
    reading.expect_stdout("reads\n");
    let checkout = |branch: &str| run_in(dir.path(), &format!("{GIT} git checkout -q {branch}"));
    ["other", "main", "other"].into_iter().for_each(checkout);
    drop(reading);
    expect_same(&machine, dir.path(), "after three checkouts on the host");

    let said = hear_out(watching, dir.path());
    let (last, overflown) = heard(&said);
    let files = shared().flat_map(|dir| (1..=FILES).map(move |file| format!("{dir}/f{file}")));
    let missed = missed(files, &last);
    assert!(missed.is_empty() || overflown, "not heard of: {missed:?}");

    // So few changes are told one by one.
    let watching = watch(&machine);
    checkout("few");
    let said = hear_out(watching, dir.path());
    let (last, overflown) = heard(&said);
    let missed = self::missed(
        shared().take(SHARED - 1).map(|dir| format!("{dir}/f1")),
        &last,
    );
    assert!(
        missed.is_empty() && !overflown,
        "not heard of: {missed:?} in {said}"
    );
    checkout("other");
    git_works_in(&machine, dir.path());
}

/// git in the guest, on what the host has checked out.
#[track_caller]
fn git_works_in(machine: &Machine<'_>, dir: &Path) {
    let git = |script: &str| {
        let script = format!("{GIT} set -e; cd {AT}; {script}");
        let output = machine.exec(&script);
        output.expect_code(0);
        output.text()
    };
    let status = "git status --porcelain";
    assert_eq!(
        git(status),
        "",
        "the status of what the host has checked out"
    );
    assert_eq!(
        git(&format!("git checkout -q few; {status}")),
        "",
        "the status after a checkout in the guest"
    );
    expect_same(machine, dir, "after a checkout in the guest");
    run_in(
        dir,
        &format!("{GIT} test -z \"$({status})\"; test $(git branch --show-current) = few"),
    );
    git(
        "echo made >made; git add made; git commit -qm made; git gc -q --prune=now; git fsck --strict --no-progress",
    );
    assert_eq!(
        git("git log --oneline --all | wc -l").trim(),
        "4",
        "commits after gc"
    );
    run_in(
        dir,
        &format!(
            "{GIT} git fsck --strict --no-progress; echo changed >d40/f1; rm d41/f2; echo new >d42/new"
        ),
    );
    let mut found = String::new();
    let seen = host::poll(|| {
        found = git(status);
        (found == " M d40/f1\n D d41/f2\n?? d42/new\n").then_some(())
    });
    assert!(
        seen.is_some(),
        "the status after the host has changed three files: {found:?}"
    );
}
