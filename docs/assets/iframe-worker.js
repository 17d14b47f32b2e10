// The search of the site runs in a Worker. Browsers start no Worker for a page that was opened from a file, so this class runs the script
// in a hidden frame instead. It has the part of the interface of Worker that the search uses.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    frame.srcdoc = "<!doctype html>";
    this.ready = new Promise((resolve) => {
      frame.addEventListener("load", () => {
        const inner = frame.contentWindow;
        inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = inner.document.createElement("script");
        script.src = url;
        script.addEventListener("load", () => resolve(inner));
        inner.document.head.append(script);
      });
    });
    document.body.append(frame);
  }

  async postMessage(data) {
    (await this.ready).dispatchEvent(new MessageEvent("message", { data }));
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
