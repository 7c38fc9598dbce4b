//! The engine for hosts that refuse io_uring: a few threads that block in system calls.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::disk::Disk;
use super::{Completion, Engine, MAX_IN_FLIGHT, Operation, ZEROES};

/// Threads per queue: what keeps a disk busy while a flush waits.
const THREADS: usize = 4;

/// The threads call into the kernel and little else.
const STACK: usize = 128 << 10;

struct Job {
    token: u16,
    operation: Operation,
    iovecs: *const libc::iovec,
    /// At most MAX_SEGMENTS.
    count: usize,
}

// SAFETY: `iovecs` points to memory that the caller of `push` keeps valid and unchanged until the
// job's completion was reaped; only the thread that took the job reads it.
unsafe impl Send for Job {}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Jobs that a thread has taken and not yet finished.
    running: usize,
    completions: Vec<Completion>,
    stop: bool,
}

struct Shared {
    disk: Arc<Disk>,
    state: Mutex<State>,
    /// There is a job, or `stop` was set.
    work: Condvar,
    /// Nothing is queued or running.
    idle: Condvar,
    /// Readable while there are completions.
    completed: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that take jobs in order and finish them in any.
pub struct Pool {
    shared: Arc<Shared>,
    pushed: Vec<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts the threads.
    pub fn new(disk: Arc<Disk>) -> io::Result<Self> {
        let capacity = usize::from(MAX_IN_FLIGHT);
        let shared = Arc::new(Shared {
            disk,
            state: Mutex::new(State {
                jobs: VecDeque::with_capacity(capacity),
                completions: Vec::with_capacity(capacity),
                ..State::default()
            }),
            work: Condvar::new(),
            idle: Condvar::new(),
            completed: EventFd::new(EFD_NONBLOCK)?,
        });
        let mut pool = Self {
            shared,
            pushed: Vec::with_capacity(capacity),
            threads: Vec::with_capacity(THREADS),
        };
        for n in 0..THREADS {
            let shared = pool.shared.clone();
            pool.threads.push(
                thread::Builder::new()
                    .name(format!("block-io/{n}"))
                    .stack_size(STACK)
                    .spawn(move || work(&shared))?,
            );
        }
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // Err where the thread panicked, which the panic hook has reported.
            let _ = thread.join();
        }
    }
}

impl Engine for Pool {
    fn completion_fd(&self) -> RawFd {
        self.shared.completed.as_raw_fd()
    }

    unsafe fn push(
        &mut self,
        token: u16,
        operation: Operation,
        iovecs: &[libc::iovec],
    ) -> io::Result<()> {
        self.pushed.push(Job {
            token,
            operation,
            iovecs: iovecs.as_ptr(),
            count: iovecs.len(),
        });
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        let pushed = self.pushed.len();
        if pushed > 0 {
            self.shared.lock().jobs.extend(self.pushed.drain(..));
        }
        for _ in 0..pushed.min(THREADS) {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let mut state = self.shared.lock();
        // Fails only when there is nothing to read.
        let _ = self.shared.completed.read();
        completions.append(&mut state.completions);
    }

    fn drain(&mut self) -> io::Result<()> {
        self.pushed.clear();
        let mut state = self.shared.lock();
        state.jobs.clear();
        while state.running > 0 {
            state = self
                .shared
                .idle
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.completions.clear();
        Ok(())
    }
}

fn work(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            state.running += 1;
            drop(state);
            let token = job.token;
            let result = perform(&shared.disk, &job);
            state = shared.lock();
            state.running -= 1;
            state.completions.push(Completion { token, result });
            // Fails only on an overflowing counter: then it is readable already.
            let _ = shared.completed.write(1);
            if state.running == 0 {
                shared.idle.notify_all();
            }
        } else if state.stop {
            return;
        } else {
            state = shared
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn perform(disk: &Disk, job: &Job) -> io::Result<u32> {
    let fd = disk.as_raw_fd();
    // At most MAX_SEGMENTS.
    let count = job.count as i32;
    // Offsets were checked against the size of the image, which fits into an off_t.
    let off = |offset: u64| offset as libc::off_t;
    // SAFETY: `fd` is open as long as `disk` is borrowed. The iovecs and what they point to are
    // valid until this job's completion is reaped, which the caller of `push` promised. ZEROES is
    // static and `len` does not reach past it.
    let result = unsafe {
        match job.operation {
            Operation::Read { offset } => libc::preadv(fd, job.iovecs, count, off(offset)),
            Operation::Write { offset, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(fd, job.iovecs, count, off(offset), flags)
            }
            Operation::WriteZeroes { offset, len } => {
                let len = len.min(ZEROES.len() as u64) as usize;
                libc::pwrite(fd, ZEROES.as_ptr().cast(), len, off(offset))
            }
            Operation::Flush => libc::fdatasync(fd) as isize,
            Operation::Allocate { mode, offset, len } => {
                libc::fallocate(fd, mode, off(offset), off(len)) as isize
            }
        }
    };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
