//! The memory of this process besides its guest's.

use crate::memory::PAGE_SIZE;

/// Lets go of the pages of this program's own file that are in memory: most were used to start a
/// machine and are not used again. They stay in the host's page cache, and one that is needed after all is
/// mapped again when it is touched.
///
/// Nothing is lost: only segments that the program cannot write to are given up. Whatever the kernel refuses
/// stays as it is.
pub fn release_program() {
    // SAFETY: getauxval(3) only looks into the vector that the kernel gave this process.
    let (headers, count) = unsafe {
        (
            libc::getauxval(libc::AT_PHDR),
            libc::getauxval(libc::AT_PHNUM),
        )
    };
    let Some(headers) = usize::try_from(headers)
        .ok()
        .filter(|address| *address != 0)
    else {
        return;
    };
    let Ok(count) = usize::try_from(count) else {
        return;
    };
    // SAFETY: AT_PHDR is the address of the program headers in the mapping of this program, AT_PHNUM
    // their number; that mapping is never changed while the process lives.
    let headers = unsafe { std::slice::from_raw_parts(headers as *const libc::Elf64_Phdr, count) };
    // Where the program is: the headers' own entry gives their address as linked.
    let Some(table) = headers.iter().find(|header| header.p_type == libc::PT_PHDR) else {
        return;
    };
    let base = (headers.as_ptr() as usize).wrapping_sub(table.p_vaddr as usize);
    let read_only = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
    };
    for segment in headers.iter().filter(read_only) {
        let start = base.wrapping_add(segment.p_vaddr as usize);
        release(start, segment.p_memsz as usize);
    }
}

fn release(start: usize, len: usize) {
    // Segments are aligned to the page size the program was linked for, which is no smaller.
    let page = PAGE_SIZE as usize;
    let first = start.next_multiple_of(page);
    let end = (start + len) / page * page;
    if first >= end {
        return;
    }
    // SAFETY: the pages between `first` and `end` belong to one segment of this program that is mapped from
    // its file, private and not writable, so they hold nothing but the file's contents (the relocated part of
    // read-only data is in a writable segment, which is not released). MADV_DONTNEED makes the next access
    // read the same bytes from the file.
    let refused =
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_DONTNEED) };
    if refused != 0 {
        tracing::debug!(
            "the program's pages stay in memory: {}",
            std::io::Error::last_os_error()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes of read-only memory of this program's file that are in memory: proc(5), smaps.
    fn resident() -> u64 {
        let program = std::fs::read_link("/proc/self/exe").unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut ours, mut sum) = (false, 0);
        for line in smaps.lines() {
            if line.contains(" r-xp ") || line.contains(" r--p ") || line.contains(" rw-p ") {
                ours = line.contains(" r-xp ") && line.ends_with(program.to_str().unwrap());
            } else if let Some(rest) = line.strip_prefix("Rss:")
                && ours
            {
                sum += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
        }
        sum
    }

    #[test]
    fn the_program_goes_on_with_less_of_it_in_memory() {
        // Reading smaps touches much the same code before and after.
        resident();
        let before = resident();
        release_program();
        let after = resident();
        assert!(after < before, "{before} KiB before, {after} KiB after");
    }
}
