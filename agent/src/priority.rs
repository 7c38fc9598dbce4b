//! The share of the machine's CPUs that the thread between the host and all programs gets.

use std::io;

/// Half of the way to the highest priority (setpriority(2)).
const NICE: libc::c_int = -10;

/// Puts the calling thread before ordinary programs, so that they wait for no connection when one of them takes
/// all CPU time. Threads and processes that it starts are ordinary ones.
pub fn raise_this_thread() {
    let parameter = libc::sched_param { sched_priority: 0 };
    let policy = libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK;
    // SAFETY: `parameter` outlives the call, which only reads it; 0 stands for the calling thread.
    let kept_to_itself = unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) } == 0;
    // SAFETY: no memory is passed; 0 stands for the calling thread.
    if !kept_to_itself || unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        let error = io::Error::last_os_error();
        eprintln!("mvm-agent: the forwarder has no priority over other programs: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn threads_and_processes_that_are_started_are_ordinary_ones() {
        let nice = || {
            // SAFETY: no memory is passed; 0 stands for the calling thread.
            unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
        };
        let raised = std::thread::spawn(move || {
            raise_this_thread();
            let (_, of_child) = crate::tests::run_outside(&mut Command::new("nice")).unwrap();
            let of_thread = std::thread::spawn(nice).join().unwrap();
            (nice(), of_thread, of_child)
        });
        let (own, of_thread, of_child) = raised.join().unwrap();
        // Without privileges nothing is raised.
        assert!(own == NICE || own == nice(), "{own}");
        let ordinary = if own == NICE { 0 } else { own };
        assert_eq!(of_thread, ordinary);
        assert_eq!(of_child.trim(), ordinary.to_string());
    }
}
