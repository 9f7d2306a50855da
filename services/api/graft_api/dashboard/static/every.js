// Looks again and again while a page is shown; a hidden tab asks for nothing.

/** Do a task again every so many seconds, one at a time, until the signal. */
export async function every(seconds, task, signal) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
    if (signal.aborted) return;
    if (document.hidden) continue;
    try {
      await task();
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
      console.warn(error);
    }
  }
}
