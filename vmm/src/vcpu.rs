//! vCPU threads: each runs one vCPU until the machine ends, and can be kicked out of the guest.
//!
//! A kick is a real-time signal whose handler sets the vCPU's `immediate_exit`: a signal that
//! arrives just before KVM_RUN is therefore not lost. The loop clears the flag first and looks at
//! what is asked of it then, so a kick sent after the request was stored always shows.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch;
use crate::control::{Control, Outcome, Request};
use crate::exit::{Buses, Handled, RunError, handle};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, null outside of its loop.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks a vCPU.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the handler of the kick signal for this process, once.
pub fn install_kick_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), on_kick).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // A const-initialized Cell without a destructor: reading it is async-signal-safe.
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: not null, so this thread is inside of `run_loop`, which owns the vCPU and with it
        // the mapping of kvm_run that the pointer was taken from. The byte is only ever accessed
        // from this thread (loop and handler) and by the kernel; volatile as the loop can be
        // interrupted between any two instructions.
        unsafe { flag.write_volatile(1) };
    }
}

/// Makes the thread behind `handle` leave the guest and look at what is asked of it.
pub fn kick(handle: &JoinHandle<()>) {
    // Fails only for a thread that has ended already.
    let _ = handle.kill(kick_signal());
}

/// For how long the thread behind `handle` has run on a CPU; zero where it has ended.
pub fn cpu_time(handle: &JoinHandle<()>) -> Duration {
    let mut clock = 0;
    // SAFETY: the thread was not joined and not detached, as `handle` owns it, so its id is valid
    // even when it has ended. `clock` lives until the call returns.
    let error = unsafe { libc::pthread_getcpuclockid(handle.as_pthread_t(), &mut clock) };
    if error != 0 {
        return Duration::ZERO;
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable and lives until the call returns. The clock may be gone by now,
    // which is an error and leaves `time` as it is.
    unsafe { libc::clock_gettime(clock, &mut time) };
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// Starts the thread of vCPU `id`; it waits until `control` says that the machine runs.
pub fn spawn(
    id: u8,
    vcpu: VcpuFd,
    buses: Arc<Buses>,
    control: Arc<Control>,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(format!("vcpu{id}"))
        .spawn(move || {
            let run = AssertUnwindSafe(|| run_loop(id, vcpu, &buses, &control));
            let error = match catch_unwind(run) {
                Ok(None) => return,
                Ok(Some(error)) => error,
                Err(_) => RunError::Panicked { vcpu: id },
            };
            control.finish(Outcome::Failed(error));
        })
}

/// Runs the vCPU until the machine is to end (None) or cannot go on.
fn run_loop(id: u8, mut vcpu: VcpuFd, buses: &Buses, control: &Control) -> Option<RunError> {
    let flag = ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
    let _guard = ImmediateExit::set(flag);
    loop {
        // Cleared first, looked at then: see the module's description.
        // SAFETY: `flag` points into the kvm_run mapping of `vcpu`, which lives to the end of this
        // function; no reference to that byte exists here.
        unsafe { flag.write_volatile(0) };
        compiler_fence(Ordering::SeqCst);
        match control.wait_until_running() {
            Request::Run => {}
            Request::RunOn => was_paused(&vcpu),
            Request::End => return None,
        }
        let fatal = match vcpu.run() {
            Ok(exit) => match handle(exit, buses) {
                Handled::Resume => continue,
                Handled::Fatal(fatal) => fatal,
            },
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
            Err(error) => {
                return Some(RunError::Run {
                    vcpu: id,
                    errno: error.errno(),
                    rip: arch::instruction_pointer(&vcpu),
                });
            }
        };
        // SAFETY: all members of the union are plain data, and KVM fills this one for the exit that
        // uses it; for others the number is not shown.
        let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        return Some(fatal.into_error(id, suberror, arch::instruction_pointer(&vcpu)));
    }
}

/// Tells the guest that time passed while this vCPU was paused, so that its watchdogs do not take
/// that for a lockup of its own. Its clocks went on.
fn was_paused(vcpu: &VcpuFd) {
    match vcpu.kvmclock_ctrl() {
        Ok(()) => {}
        // The guest uses no kvm-clock: it has nothing to be told by, or has not booted that far.
        Err(error) if error.errno() == libc::EINVAL => {}
        Err(error) => tracing::debug!("a guest was not told that it was paused: {error}"),
    }
}

/// Publishes a vCPU's `immediate_exit` to the signal handler for as long as it lives.
struct ImmediateExit;

impl ImmediateExit {
    fn set(flag: *mut u8) -> Self {
        IMMEDIATE_EXIT.set(flag);
        Self
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
