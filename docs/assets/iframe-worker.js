// Search on pages that are opened from a disk: browsers start no worker there, so its script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc =
        "<script>self.receive = self.postMessage.bind(self); self.postMessage = data => parent.postMessage(data, '*')</script>" +
        `<script src="${url}"></script>`;
      this.loaded = new Promise(resolve => this.frame.addEventListener("load", resolve));
      window.addEventListener("message", event => {
        if (event.source === this.frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      document.body.append(this.frame);
    }
    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.receive(data, "*"));
    }
  };
}
